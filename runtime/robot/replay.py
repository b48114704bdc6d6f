"""Replay: does a policy answer now what was recorded (recording.py)?

Every recorded observation goes through the policy with the recorded noise, steps, previous chunk,
delay and real-time chunking. The same bundle must agree within the tolerance of a self-check;
another one is compared, not judged.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ...core.errors import CheckFailed, InputError, SettingsError
from ...core.strict import decode
from ..policy.policy import Policy, Timing
from ..policy.selfcheck import TOLERANCE
from .chunks import Continuation
from .inference import ActionChunk, ChunkRequest
from .recording import CHUNKS, FORMAT, META, VERSION, RunMeta


@dataclass(frozen=True)
class Recording:
    """A recording in a folder; `chunk` reads one of its chunks."""

    meta: RunMeta
    files: tuple[Path, ...]  # one .npz per finished chunk, in the order they were asked for

    def chunk(self, file: Path) -> ActionChunk:
        """As requested and answered; the timing is zero. Raises SettingsError for a damaged
        file."""
        path, images = file, {}
        try:
            for camera in self.meta.cameras:
                path = file.with_name(f"{file.stem}.{camera}.png")
                image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
                if image is None:
                    raise ValueError("not a whole picture")
                images[camera] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
            path = file
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
                rest = {
                    name: value if value.ndim else value.item() for name, value in stored.items()
                }
            continuation = Continuation(0, rest.pop("prev_chunk", None), rest.pop("delay"))
            request = ChunkRequest(images, rest.pop("state"), continuation, rest.pop("time_s"))
            return ActionChunk(request=request, timing=Timing(0.0, 0.0, 0.0), **rest)
        except Exception as e:  # numpy and OpenCV have a dozen kinds for a damaged file
            raise SettingsError(
                f"{path} is damaged ({e}): remove the chunk {file.stem}.* to replay the rest"
            ) from e


def read_recording(folder: Path) -> Recording:
    """Raises SettingsError for a folder that holds no recording, or none that this version
    reads."""
    path = folder / META
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise SettingsError(f"{path} cannot be read ({e}): name the folder of a recording") from e
    found = [raw.get(key) for key in ("format", "version")] if isinstance(raw, dict) else None
    if found != [FORMAT, VERSION]:
        raise SettingsError(
            f"{path} has format and version {found}, this runtime reads {[FORMAT, VERSION]}"
        )
    problems: list[str] = []
    try:
        meta = decode(RunMeta, raw, problems)
    except InputError as e:  # real-time chunking checks itself
        meta, problems = None, [str(e)]
    if meta is None:
        raise SettingsError(f"{path} is damaged: {'; '.join(problems)}")
    return Recording(meta, tuple(sorted((folder / CHUNKS).glob("*.npz"))))


def differences(
    recording: Recording, policy: Policy
) -> Iterator[tuple[Path, NDArray[np.float64], float]]:
    """-> for each chunk its file, the largest difference of each joint in robot units [dof], and
    the scale to judge it by: max(1, largest magnitude recorded), as in a self-check.

    Raises InputError where the recording does not fit the policy's bundle.
    """
    meta, m = recording.meta, policy.manifest
    fits: list[tuple[str, object, object]] = [
        ("cameras", sorted(meta.cameras), sorted(c.name for c in m.cameras)),
        ("joints", meta.joints or m.joints or (), m.joints or meta.joints),
        ("actions' dimensions", len(meta.joints) or m.action.dim, m.action.dim),
        ("units", meta.units, m.units or meta.units),
    ]
    wrong = [f"its {what} are {was}, the bundle has {now}" for what, was, now in fits if was != now]
    if wrong:
        raise InputError(f"the recording does not fit {policy.bundle.folder}: {'; '.join(wrong)}")
    policy.rtc = meta.rtc
    for file in recording.files:
        chunk = recording.chunk(file)
        request, continuation = chunk.request, chunk.request.continuation
        got = policy.predict_chunk(
            request.images,
            request.state,
            meta.task,
            chunk.noise,
            chunk.steps,
            continuation.prev_chunk,
            continuation.delay,
        ).astype(np.float64)
        was = chunk.actions.astype(np.float64)
        if got.shape != was.shape:
            raise InputError(
                f"{file} holds actions of shape {was.shape}, the bundle answers {got.shape}"
            )
        with np.errstate(invalid="ignore"):
            apart = np.where((got == was) | (np.isnan(got) & np.isnan(was)), 0.0, np.abs(got - was))
        scale = np.abs(was[np.isfinite(was)]).max(initial=1.0)
        yield file, np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(axis=0), float(scale)


def replay(folder: Path, policy: Policy) -> None:
    """Print how far the policy's answers are from the recorded ones.

    Raises SettingsError for the folder, InputError where it does not fit the bundle, and
    CheckFailed where the recorded bundle itself answers something else.
    """
    recording = read_recording(folder)
    meta, same = recording.meta, recording.meta.bundle_digest == policy.bundle.digest
    if not recording.files:
        raise SettingsError(
            f"{folder / CHUNKS} holds no finished chunk: there is nothing to replay"
        )
    limit, failed = TOLERANCE[policy.manifest.precision], ""
    names = meta.joints or tuple(f"joint {i}" for i in range(policy.manifest.action.dim))
    worst, where = np.zeros(len(names)), ["-"] * len(names)
    print(f"{len(recording.files)} chunks of {folder}, {meta.task!r}, {meta.units}", flush=True)
    for file, apart, scale in differences(recording, policy):
        joint = int(apart.argmax())
        if not failed and apart[joint] > limit * scale:
            failed = (
                f"chunk {file.stem} by {apart[joint]:.1e} in {names[joint]} "
                f"(at most {limit * scale:.0e})"
            )
        for i in np.flatnonzero(apart > worst):
            worst[i], where[i] = apart[i], file.stem
    print(f"{'joint':<16}{'largest difference':>20}  in chunk")
    print("\n".join(f"{n:<16}{w:>20.1e}  {c}" for n, w, c in zip(names, worst, where, strict=True)))
    what = (
        "the same bundle"
        if same
        else f"another bundle ({meta.precision} then, {policy.manifest.precision} now)"
    )
    print(f"replayed with {what}: at most {worst.max():.1e} from what was recorded", flush=True)
    if same and failed:
        raise CheckFailed(
            f"the bundle does not answer what was recorded, first in {failed}; try --self-check"
        )
