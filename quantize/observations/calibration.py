"""The observations that calibrate INT8, and those that judge it, from one of four sources.

    FOLDER        a LeRobot dataset (dataset.py), or what smolvla-run --record left
    user/name     a LeRobot dataset on the Hub
    synthetic     drawn ones, for trials

Frames are spread over tasks, then over episodes, then over time. The held-out frames come from a
fifth of the episodes; where there is only one episode, from its last fifth. This split does not
depend on the number of frames: a later judgement on the same source does not see what calibrated.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np

from ...core.errors import ObservationsError
from ...core.progress import SILENT, Progress
from ...runtime.bundle.manifest import CalibrationData
from ...runtime.robot.recording import META
from ...runtime.robot.replay import read_recording
from .sample import Sample, draw_samples

SYNTHETIC = "synthetic"
Kind = Literal["dataset", "recording", "synthetic"]
Episodes = Mapping[int, tuple[int, tuple[str, ...]]]  # number -> frames, tasks
Reader = Callable[[int, Sequence[int]], list[Sample]]  # number of an episode, some of its frames
Frames = dict[int, list[int]]  # number of an episode -> some of its frames, ascending


@dataclass(frozen=True)
class CalibrationSet:
    """What was drawn. record: of both parts together; synthetic samples have no episodes."""

    record: CalibrationData
    calibration: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    held_out_episodes: int


def read_calibration(
    source: str,
    cameras: Sequence[str],
    state_dim: int,
    instructions: Sequence[str],
    *,
    statistics: Mapping[str, Sequence[float]] = {},
    frames: int = 32,
    held_out: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """Draw `frames` observations to calibrate with and `held_out` to judge by, or all there are.

    instructions, statistics: for synthetic observations; statistics has the mean and std of the
    state, [dof] in robot units, else 0 and 1.
    Raises ObservationsError where the source is missing, damaged or does not fit the robot, and
    SettingsError where a recording is damaged.
    """
    kind = kind_of(source)
    numbers: tuple[Frames, Frames] = ({}, {})
    if kind == "synthetic":
        progress.note(
            "warning: synthetic calibration: the ranges come from drawn pictures, so the accuracy "
            "on your robot's pictures is unknown. For trials only: give the dataset that the "
            "policy was trained with"
        )
        parts = (
            draw_samples(frames, cameras, state_dim, statistics, instructions, seed),
            draw_samples(held_out, cameras, state_dim, statistics, instructions, seed + 1),
        )
    else:
        folder = Path(source).expanduser()
        progress.stage(f"reading {source}", own_bar=not folder.exists())
        if kind == "recording":
            episodes, read = _open_recording(folder, cameras)
        else:
            episodes, read = _open_dataset(source, cameras, state_dim)
        total = sum(length for length, _ in episodes.values())
        if total < 2:
            raise ObservationsError(
                f"{source} has {total} frames, expected at least 2, better {frames + held_out}: "
                "record more"
            )
        numbers = choose_frames(episodes, frames, held_out, seed)
        parts = _read(numbers, read, state_dim, source, progress)
    samples = (*parts[0], *parts[1])
    digest, size = _digest(samples)
    tasks = len({sample.task for sample in samples})
    count = len(numbers[0].keys() | numbers[1])
    progress.note(
        f"{len(parts[0])} observations to calibrate with, {len(parts[1])} to judge by, "
        f"from {count} episodes with {tasks} tasks"
    )
    return CalibrationSet(
        CalibrationData(source, kind, digest, size, len(samples), count), *parts, len(numbers[1])
    )


def kind_of(source: str) -> Kind:
    """What `source` names; a dataset can be on the Hub."""
    if source == SYNTHETIC:
        return "synthetic"
    return "recording" if (Path(source).expanduser() / META).is_file() else "dataset"


def choose_frames(
    episodes: Episodes, frames: int, held_out: int, seed: int
) -> tuple[Frames, Frames]:
    """-> the frames to calibrate with, and the held-out ones, of at least two frames in all."""
    numbers = [number for number, (length, _) in episodes.items() if length]
    shuffled = [numbers[i] for i in np.random.default_rng(seed).permutation(len(numbers))]
    order = _in_turns(_by_tasks(shuffled, episodes))
    single = len(order) == 1
    # What is cut in two: frames, or episodes.
    whole = episodes[order[0]][0] if single else len(order)
    cut = whole - min(max(round(whole / 5), 1), whole - 1)
    spans = {number: range(episodes[number][0]) for number in order}
    first = {order[0]: range(cut)} if single else {number: spans[number] for number in order[:cut]}
    rest = (
        {order[0]: range(cut, whole)}
        if single
        else {number: spans[number] for number in order[cut:]}
    )
    return _spread(first, episodes, frames), _spread(rest, episodes, held_out)


def _spread(spans: Mapping[int, range], episodes: Episodes, count: int) -> Frames:
    """`count` frames out of the spans of some episodes, or all of them."""
    slots = [
        _in_turns([[number] * min(len(spans[number]), count) for number in group])
        for group in _by_tasks(spans, episodes)
    ]
    counts = Counter(_in_turns(slots)[:count])
    # Each episode begins at another phase, so that single frames are not all from the middle.
    return {
        number: [
            spans[number][int((i + (k + 0.5) / len(counts)) / n * len(spans[number]))]
            for i in range(n)
        ]
        for k, (number, n) in enumerate(counts.items())
    }


def _by_tasks(numbers: Iterable[int], episodes: Episodes) -> list[list[int]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for number in numbers:
        groups.setdefault(episodes[number][1], []).append(number)
    return list(groups.values())


def _in_turns(groups: Sequence[Sequence[int]]) -> list[int]:
    """The first of each group, then the second of each, and so on."""
    return [x for turn in zip_longest(*groups) for x in turn if x is not None]


def _open_dataset(source: str, cameras: Sequence[str], state_dim: int) -> tuple[Episodes, Reader]:
    from .dataset import open_dataset  # needs av and pyarrow, which other sources do not

    dataset = open_dataset(source, cameras, state_dim)
    episodes = {number: (e.length, e.tasks) for number, e in dataset.episodes.items()}
    return episodes, dataset.frames


def _open_recording(folder: Path, cameras: Sequence[str]) -> tuple[Episodes, Reader]:
    """A recording as one episode."""
    recording = read_recording(folder)
    meta = recording.meta
    missing = [camera for camera in cameras if camera not in meta.cameras]
    if missing:
        raise ObservationsError(
            f"{folder} has no camera {', '.join(missing)} (found {', '.join(meta.cameras)}): "
            "give a recording of the policy's robot"
        )

    def read(_: int, indices: Sequence[int]) -> list[Sample]:
        seen = [recording.chunk(recording.files[i]).request for i in indices]
        return [
            Sample({c: o.images[c] for c in cameras}, np.asarray(o.state, np.float32), meta.task)
            for o in seen
        ]

    return {0: (len(recording.files), (meta.task,))}, read


def _read(
    parts: Sequence[Frames], read: Reader, state_dim: int, source: str, progress: Progress
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """The samples of each part."""
    total = sum(len(indices) for part in parts for indices in part.values())
    done = 0
    result = []
    for part in parts:
        samples: list[Sample] = []
        for number, indices in sorted(part.items()):
            samples += read(number, indices)
            for i, sample in zip(indices, samples[-len(indices) :], strict=True):
                if sample.state.shape != (state_dim,) or not np.isfinite(sample.state).all():
                    raise ObservationsError(
                        f"{source}: the state in frame {i} of episode {number} is "
                        f"{sample.state.tolist()}, expected {state_dim} finite numbers: remove the "
                        "episode, or give data of the policy's robot"
                    )
            done += len(indices)
            progress.count(done, total)
        result.append(tuple(samples))
    return result[0], result[1]


def _digest(samples: Sequence[Sample]) -> tuple[str, int]:
    """-> SHA-256, bytes."""
    digest, size = hashlib.sha256(), 0
    for sample in samples:
        parts = [
            (f"{camera} {image.shape}", image.tobytes()) for camera, image in sample.images.items()
        ]
        for name, data in (
            *parts,
            ("state", sample.state.tobytes()),
            ("task", sample.task.encode()),
        ):
            digest.update(f"{name} {len(data)} ".encode() + data)
            size += len(data)
    return digest.hexdigest(), size
