"""A recording: the log of a run and everything that the policy got and answered.

    DIR/run.json                  RunMeta
    DIR/ticks.jsonl               one JSON object per tick, as in a log without a recording
    DIR/chunks/000000.front.png   the picture of camera `front` in request 0; one for each camera
    DIR/chunks/000000.npz         the other inputs: state, noise, steps, prev_chunk (where there was
                                  one), delay; and the answer: actions, time_s, latency_s.
                                  Written last: a chunk without it was never finished

The files of a chunk are written whole, by renaming. A crash can cut the last line of the log.
replay.py reads all of it. Nothing in a recording is ever deleted by us.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...core.errors import SettingsError
from ...core.files import write_whole
from ...core.strict import encode
from ...devices.arm.calibration import JOINT_NAMES
from ..bundle.manifest import Precision
from ..policy.policy import Policy
from ..policy.sampling import RealTimeChunking
from .checked_run import CheckedRun
from .chunks import Chunking
from .inference import ActionChunk
from .run_log import RunLog, reason

FORMAT, VERSION = "smolvla-edge-recording", 1
META, TICKS, CHUNKS = "run.json", "ticks.jsonl", "chunks"


@dataclass(frozen=True)
class RunMeta:
    """What was run. bundle: its folder. bundle_digest: its identity (Bundle.digest). reason: why
    the device was chosen, in words."""

    bundle: str
    bundle_digest: str
    precision: Precision
    device: str  # the device of the engine: cpu, cuda or tensorrt
    task: str
    fps: float
    units: str
    chunking: Chunking
    rtc: RealTimeChunking  # what the policy used with a previous chunk
    cameras: tuple[str, ...]
    joints: tuple[str, ...]  # names of the action values; empty: not known
    seed: int | None
    reason: str = ""
    format: str = FORMAT
    version: int = VERSION


class Recorder(RunLog):
    """A run log, `ticks.jsonl` of a new folder, with the policy's chunks beside it."""

    def __init__(self, folder: Path, meta: RunMeta) -> None:
        """Raises SettingsError unless the folder is new or empty, and can be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise SettingsError(
                    f"{folder} is not empty: record into a new folder, so that two runs never mix"
                )
            (folder / CHUNKS).mkdir()
            write_whole(folder / META, json.dumps(encode(meta), indent=1).encode() + b"\n")
        except (OSError, ValueError) as e:
            raise SettingsError(
                f"cannot record into {folder} ({reason(e)}): name a new folder"
            ) from e
        super().__init__(folder / TICKS)
        self.chunks = 0

    def answered(self, chunk: ActionChunk) -> None:
        """Returns at once. The arrays must not change afterwards."""
        if not self._submit(partial(self._save, self.chunks, chunk)):
            self.dropped_chunks += 1
        self.chunks += 1

    def _save(self, number: int, chunk: ActionChunk) -> None:
        folder, request = self.path.parent / CHUNKS, chunk.request
        for camera, image in request.images.items():
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            png = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
            write_whole(folder / f"{number:06d}.{camera}.png", png.tobytes())
        arrays: dict[str, Any] = {
            "state": request.state,
            "prev_chunk": request.continuation.prev_chunk,
            "delay": request.continuation.delay,
            "time_s": request.time_s,
            "noise": chunk.noise,
            "steps": chunk.steps,
            "actions": chunk.actions,
            "latency_s": chunk.latency_s,
        }
        data = io.BytesIO()
        np.savez(data, **{name: value for name, value in arrays.items() if value is not None})
        write_whole(folder / f"{number:06d}.npz", data.getvalue())


@contextlib.contextmanager
def open_log(run: CheckedRun, policy: Policy) -> Iterator[RunLog]:
    """The log of one run, closed on the way out. SettingsError where --record cannot be used."""
    settings, manifest = run.settings, run.bundle.manifest
    if settings.record:
        meta = RunMeta(
            bundle=settings.bundle,
            bundle_digest=run.bundle.digest,
            precision=manifest.precision,
            device=policy.graphs.device,
            reason=policy.graphs.reason,
            task=run.task,
            fps=run.fps,
            units=run.units.value,
            chunking=settings.chunking,
            rtc=policy.rtc,
            cameras=tuple(c.name for c in manifest.cameras),
            joints=manifest.joints or JOINT_NAMES,
            seed=settings.seed,
        )
        log: RunLog = Recorder(Path(settings.record), meta)
        print(f"recording to {settings.record}")
    else:
        log = RunLog.in_folder(int(1e6 * settings.log_mb))
        print(f"log: {log.path}")
    try:
        yield log
    finally:
        log.close()
