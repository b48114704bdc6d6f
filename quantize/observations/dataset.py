"""A LeRobot dataset, v2.0 to v3.0, from a folder or the Hub: its episodes, and single frames.

    meta/info.json                                version, fps, features, and the paths of the files
    v2   meta/episodes.jsonl, meta/tasks.jsonl    one parquet file, and a video a camera, an episode
    v3   meta/episodes/, meta/tasks.parquet       several episodes share a parquet file or a video

A row of the data has the state, the task index and the time in the episode. Pictures are in the
videos or the rows. From the Hub, meta/ is loaded first, and each file when a frame of it is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from ...core.errors import ObservationsError
from .hub import from_hub, is_hub_id
from .sample import Sample

VERSIONS = ("v2.0", "v2.1", "v3.0")
STATE = "observation.state"
_REORDERED = 16  # frames: how much later a codec may show a frame than it decodes it
_AGAIN = "copy the dataset again"


@dataclass(frozen=True)
class Episode:
    """Where an episode lies. Files are relative to the dataset."""

    length: int  # frames
    tasks: tuple[str, ...]
    data: str
    # Camera -> file, and the second in it at which the episode begins
    videos: Mapping[str, tuple[str, float]]


@dataclass(frozen=True)
class Dataset:
    """What meta/ says of the cameras that are needed. repo: the Hub id of a dataset from there."""

    root: Path
    repo: str | None
    frame_s: float  # from one frame to the next
    cameras: Mapping[str, str]  # camera -> feature
    tasks: Mapping[int, str]
    episodes: Mapping[int, Episode]

    def frames(self, number: int, indices: Sequence[int]) -> list[Sample]:
        """Frames `indices` of episode `number`. Raises ObservationsError for damaged files."""
        episode = self.episodes[number]
        path = self._file(episode.data)
        columns = ["frame_index", "timestamp", "task_index", STATE]
        columns += [
            feature for camera, feature in self.cameras.items() if camera not in episode.videos
        ]
        found = _rows(
            path, columns, [("episode_index", "=", number), ("frame_index", "in", list(indices))]
        )
        by_index = {row["frame_index"]: row for row in found}
        missing = [i for i in indices if i not in by_index]
        if missing:
            raise ObservationsError(
                f"{path} lacks frames {missing} of episode {number}, expected {episode.length} "
                f"frames: {_AGAIN}"
            )
        rows = [by_index[i] for i in indices]
        unknown = {row["task_index"] for row in rows} - set(self.tasks)
        if unknown:
            raise ObservationsError(
                f"{path} has the tasks {unknown}, meta/ only {sorted(self.tasks)}: {_AGAIN}"
            )
        images = {}
        for camera, feature in self.cameras.items():
            if camera in episode.videos:
                name, start_s = episode.videos[camera]
                images[camera] = _decode(
                    self._file(name), [start_s + row["timestamp"] for row in rows], self.frame_s
                )
            else:
                images[camera] = [
                    _picture(row[feature], f"{path}, episode {number}, {feature}") for row in rows
                ]
        return [
            Sample(
                {camera: pictures[k] for camera, pictures in images.items()},
                np.asarray(row[STATE], np.float32),
                self.tasks[row["task_index"]],
            )
            for k, row in enumerate(rows)
        ]

    def _file(self, name: str) -> Path:
        return self.root / name if self.repo is None else _from_hub(self.repo, name, self.root.name)


def open_dataset(source: str, cameras: Sequence[str], state_dim: int) -> Dataset:
    """Read meta/ of a folder or, where there is none of that name, of a Hub id.

    Raises ObservationsError where it is missing, damaged, of an unknown version, lacks one of
    `cameras`, or has a state of another width than `state_dim`.
    """
    root, repo = Path(source).expanduser(), None
    if not root.exists():
        if not is_hub_id(source):
            raise ObservationsError(
                f"{source} is not there: give a folder, a Hub id such as user/name, or synthetic"
            )
        root, repo = _from_hub(source), source
    if not (root / "meta/info.json").is_file():
        raise ObservationsError(
            f"{source} has neither meta/info.json nor run.json: give a LeRobot dataset, or a "
            "folder that smolvla-run --record wrote"
        )
    try:
        return _read_meta(root, repo, cameras, state_dim)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        raise ObservationsError(
            f"{root / 'meta'} is damaged ({e if isinstance(e, OSError) else repr(e)}): {_AGAIN}"
        ) from e


def _read_meta(root: Path, repo: str | None, cameras: Sequence[str], state_dim: int) -> Dataset:
    info = json.loads((root / "meta/info.json").read_text())
    version, features = info["codebase_version"], info["features"]
    if version not in VERSIONS:
        raise ObservationsError(
            f"{root} has the codebase_version {version!r}, expected {', '.join(VERSIONS)}: "
            "convert it with LeRobot"
        )
    kinds = {
        name: feature["dtype"]
        for name, feature in features.items()
        if feature["dtype"] in ("image", "video")
    }
    names = {name.removeprefix("observation.").removeprefix("images."): name for name in kinds}
    problems = []
    missing = [camera for camera in cameras if camera not in names]
    if missing:
        problems.append(f"no camera {', '.join(missing)} (found {', '.join(names) or 'none'})")
    shape = features[STATE]["shape"]
    if shape != [state_dim]:
        problems.append(f"a state of shape {shape}, expected {[state_dim]}")
    if problems:
        raise ObservationsError(
            f"{root} has {' and '.join(problems)}: give a dataset recorded with the policy's robot"
        )
    videos = {camera: names[camera] for camera in cameras if kinds[names[camera]] == "video"}
    if version == "v3.0":
        places = ["data", *(f"videos/{feature}" for feature in videos.values())]
        columns = [
            "episode_index",
            "length",
            "tasks",
            *(f"{place}/from_timestamp" for place in places[1:]),
        ]
        columns += [f"{place}/{kind}_index" for place in places for kind in ("chunk", "file")]
        rows = [
            row
            for path in sorted((root / "meta/episodes").rglob("*.parquet"))
            for row in _rows(path, columns)
        ]
        tasks = _rows(root / "meta/tasks.parquet")
    else:
        rows, tasks = _lines(root / "meta/episodes.jsonl"), _lines(root / "meta/tasks.jsonl")

    def file(row: Mapping[str, Any], template: str, place: str, feature: str = "") -> str:
        number, chunk, part = (
            row["episode_index"],
            row.get(f"{place}/chunk_index"),
            row.get(f"{place}/file_index"),
        )
        old = {"episode_index": number, "episode_chunk": number // info["chunks_size"]}
        return template.format(video_key=feature, chunk_index=chunk, file_index=part, **old)

    def video(row: Mapping[str, Any], feature: str) -> tuple[str, float]:
        place = f"videos/{feature}"
        return file(row, info["video_path"], place, feature), float(
            row.get(f"{place}/from_timestamp", 0.0)
        )

    episodes = {
        int(row["episode_index"]): Episode(
            int(row["length"]),
            tuple(row["tasks"]),
            file(row, info["data_path"], "data"),
            {camera: video(row, feature) for camera, feature in videos.items()},
        )
        for row in rows
    }
    # The text is the only other column: "task", or the name that pandas gives to an index.
    texts = {int(row.pop("task_index")): str(*row.values()) for row in tasks}
    return Dataset(
        root,
        repo,
        1 / float(info["fps"]),
        {camera: names[camera] for camera in cameras},
        texts,
        episodes,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]


def _rows(
    path: Path, columns: list[str] | None = None, filters: list[tuple[str, str, Any]] | None = None
) -> list[dict[str, Any]]:
    try:
        table = pyarrow.parquet.read_table(path, columns=columns, filters=filters)
    except (pyarrow.ArrowException, OSError) as e:
        what = f"cannot be read ({str(e).splitlines()[0]})" if path.exists() else "is missing"
        raise ObservationsError(f"{path} {what}: {_AGAIN}") from e
    return [dict(row) for row in table.to_pylist()]


def _picture(cell: Any, where: str) -> NDArray[np.uint8]:
    """{bytes, path} of an encoded picture -> [H, W, 3] RGB."""
    encoded = cell["bytes"] if isinstance(cell, dict) else None
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) if encoded else None
    if image is None:
        raise ObservationsError(f"{where} holds no whole picture: {_AGAIN}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def _decode(path: Path, times_s: Sequence[float], frame_s: float) -> list[NDArray[np.uint8]]:
    """The frames that a video shows at `times_s`, [H, W, 3] RGB each."""
    try:
        with av.open(str(path)) as container:
            return [_frame_at(container, time_s, frame_s) for time_s in times_s]
    except (av.FFmpegError, LookupError) as e:
        why = e.strerror if isinstance(e, av.FFmpegError) else "no video in it"
        what = f"cannot be decoded ({why})" if path.exists() else "is missing"
        raise ObservationsError(f"{path} {what}: {_AGAIN}") from e


def _frame_at(container: Any, time_s: float, frame_s: float) -> NDArray[np.uint8]:
    stream = container.streams.video[0]
    # The keyframe found for a time can be shown after that time: look for an earlier one.
    container.seek(int((time_s - _REORDERED * frame_s) / stream.time_base), stream=stream)
    shown = next(
        (frame for frame in container.decode(stream) if frame.time > time_s - frame_s / 2), None
    )
    if shown is None or shown.time > time_s + frame_s / 2:
        raise ObservationsError(
            f"{container.name} has no frame at {time_s:.3f} s, but the data has: {_AGAIN}"
        )
    image: NDArray[np.uint8] = shown.to_ndarray(format="rgb24")
    return image


def _from_hub(repo: str, name: str | None = None, commit: str | None = None) -> Path:
    """meta/ of the newest commit, in a folder that has its name; or one file of a commit.

    From the local cache where the Hub does not answer.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    with from_hub(
        f"{repo} is no folder here, and" if name is None else f"{name} of {repo}", ObservationsError
    ):
        if name is None:
            return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=["meta/*"]))
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))
