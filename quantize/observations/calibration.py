"""The observations that INT8 is calibrated with, and others to judge it by, from one of four sources.

    FOLDER        a LeRobot dataset (dataset.py), or what smolvla-run --record left
    user/name     a LeRobot dataset on the Hub
    synthetic     drawn ones, for trials

Frames are spread over tasks, then over episodes, then over time. Those held out come from a fifth of the episodes, or
where there is only one from its last fifth, however many frames are asked for: who judges a bundle later on the same
source judges on what it was not calibrated with.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np

from ...core.errors import ObservationsError
from ...runtime.bundle.manifest import CalibrationData
from ...runtime.robot.recording import META
from ...runtime.robot.replay import read_recording
from .dataset import open_dataset
from .sample import Sample, draw_samples

PROGRESS_S = 5.0
Episodes = Mapping[int, tuple[int, tuple[str, ...]]]  # number -> frames, tasks
Reader = Callable[[int, Sequence[int]], list[Sample]]  # number of an episode, some of its frames
Frames = dict[int, list[int]]  # number of an episode -> some of its frames, ascending


@dataclass(frozen=True)
class CalibrationSet:
    """What was drawn; record: of both parts together, and of nothing else (no episodes where synthetic)."""

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
    say: Callable[[str], None] = print,
) -> CalibrationSet:
    """Draw `frames` observations to calibrate with and `held_out` to judge by, fewer where there are fewer.

    instructions, statistics: of synthetic observations, the latter mean and std of the state [dof] in robot units,
    0 and 1 where they are missing.
    Raises ObservationsError where the source is missing, damaged or does not fit the robot, and SettingsError where a
    recording is damaged.
    """
    kind: Literal["dataset", "recording", "synthetic"] = "dataset"
    numbers: tuple[Frames, Frames] = ({}, {})
    if source == "synthetic":
        kind = "synthetic"
        say(
            "warning: synthetic calibration: ranges come from drawn pictures, and nothing is known of the accuracy "
            "on your robot's. For trials only: give the dataset that the policy was trained with"
        )
        parts = (
            draw_samples(frames, cameras, state_dim, statistics, instructions, seed),
            draw_samples(held_out, cameras, state_dim, statistics, instructions, seed + 1),
        )
    else:
        folder = Path(source).expanduser()
        if (folder / META).is_file():
            kind = "recording"
            episodes, read = _open_recording(folder, cameras)
        else:
            dataset = open_dataset(source, cameras, state_dim)
            episodes, read = (
                {n: (e.length, e.tasks) for n, e in dataset.episodes.items()},
                dataset.frames,
            )
        if (total := sum(length for length, _ in episodes.values())) < 2:
            raise ObservationsError(
                f"{source} has {total} frames, expected at least 2, better {frames + held_out}: record more"
            )
        numbers = choose_frames(episodes, frames, held_out, seed)
        parts = _read(numbers, read, state_dim, source, say)
    samples = (*parts[0], *parts[1])
    digest, size = _digest(samples)
    tasks = len({sample.task for sample in samples})
    said = f"{len(parts[0])} observations to calibrate with, {len(parts[1])} to judge by"
    count = len(numbers[0].keys() | numbers[1])
    say(f"{said}, from {count} episodes with {tasks} tasks")
    return CalibrationSet(
        CalibrationData(source, kind, digest, size, len(samples), count), *parts, len(numbers[1])
    )


def choose_frames(
    episodes: Episodes, frames: int, held_out: int, seed: int
) -> tuple[Frames, Frames]:
    """-> the frames to calibrate with, and the held-out ones. At least two frames in all are expected."""
    numbers = [number for number, (length, _) in episodes.items() if length]
    shuffled = [numbers[i] for i in np.random.default_rng(seed).permutation(len(numbers))]
    order = _in_turns(_by_tasks(shuffled, episodes))
    single = len(order) == 1
    whole = (
        episodes[order[0]][0] if single else len(order)
    )  # what is cut in two: frames, or episodes
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


def _open_recording(folder: Path, cameras: Sequence[str]) -> tuple[Episodes, Reader]:
    """A recording as one episode."""
    recording = read_recording(folder)
    meta = recording.meta
    if missing := [camera for camera in cameras if camera not in meta.cameras]:
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
    parts: Sequence[Frames], read: Reader, state_dim: int, source: str, say: Callable[[str], None]
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """The samples of each part, with a line every few seconds."""
    total, done, told_s = (
        sum(len(indices) for part in parts for indices in part.values()),
        0,
        time.monotonic(),
    )
    result = []
    for part in parts:
        samples: list[Sample] = []
        for number, indices in sorted(part.items()):
            samples += read(number, indices)
            for i, sample in zip(indices, samples[-len(indices) :], strict=True):
                if sample.state.shape != (state_dim,) or not np.isfinite(sample.state).all():
                    raise ObservationsError(
                        f"{source}: the state in frame {i} of episode {number} is {sample.state.tolist()}, expected "
                        f"{state_dim} finite numbers: remove the episode, or give data of the policy's robot"
                    )
            done += len(indices)
            if time.monotonic() - told_s >= PROGRESS_S:
                told_s = time.monotonic()
                say(f"read {done} of {total} observations")
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
