"""Observations to calibrate with: from datasets, from recordings, and synthetic ones."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import av
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest

from smolvla_edge.core.errors import ObservationsError
from smolvla_edge.core.progress import Progress
from smolvla_edge.quantize.observations.calibration import choose_frames, read_calibration
from smolvla_edge.runtime import SettingsError
from support.datasets import (
    CAMERAS,
    EPISODES,
    FPS,
    write_dataset,
    write_json,
    write_parquet,
    write_video,
)
from support.hub import COMMIT
from support.recordings import record, some_chunk

VERSIONS = ("v2.1", "v3.0")
TASKS = ["Pick.", "Place."]


def number_in(image, camera):
    bits = (image[12::24, 8::16].mean(-1) > 127) ^ (CAMERAS[camera] > 0)
    assert image[1, 1].argsort().tolist() == [2, 1, 0]  # still orange, and above
    return int(sum(int(bit) << k for k, bit in enumerate(bits.ravel())))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {
        version: write_dataset(tmp_path_factory.mktemp("made") / "set", version)
        for version in VERSIONS
    }


def read(source, cameras=("wrist", "front"), state_dim=6, **options):
    return read_calibration(str(source), cameras, state_dim, TASKS, **options)


def require_right(drawn, episodes=EPISODES):
    """Every picture and task is the one its state names. -> the episodes of the frames to calibrate
    with, and of the held-out ones."""
    firsts = np.cumsum([0, *(length for length, _ in episodes)])
    found = []
    for part in (drawn.calibration, drawn.held_out):
        numbers = [int(sample.state[0]) for sample in part]
        assert len(set(numbers)) == len(numbers)
        owners = (np.searchsorted(firsts, numbers, "right") - 1).tolist()
        for sample, number, owner in zip(part, numbers, owners, strict=True):
            assert list(sample.images) == ["wrist", "front"]
            assert {number_in(image, camera) for camera, image in sample.images.items()} == {number}
            assert all(
                image.shape == (48, 64, 3) and image.dtype == np.uint8
                for image in sample.images.values()
            )
            assert (
                sample.state.tolist() == [number, 0, 0, 0, 0, 1]
                and sample.state.dtype == np.float32
            )
            assert sample.task == episodes[owner][1]
        found.append(owners)
    return found


def test_the_test_videos_have_distant_keyframes_and_frames_out_of_order(made):
    with av.open(str(next(made["v3.0"].rglob("*.mp4")))) as container:
        frames = list(container.decode(video=0))
    assert sum(frame.key_frame for frame in frames) < len(frames) / 10
    assert "B" in {av.video.frame.PictureType(frame.pict_type).name for frame in frames}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_frame_of_every_episode_is_the_right_one(made, version):
    drawn = read(made[version], frames=100, held_out=40)
    calibration, held_out = require_right(drawn)
    assert len(calibration) == 100
    assert Counter(held_out) in [
        Counter({i: min(length, 40)}) for i, (length, _) in enumerate(EPISODES)
    ]


@pytest.mark.parametrize("version", ["v2.0", *VERSIONS])
def test_pictures_inside_the_rows_are_read_too(tmp_path, version):
    require_right(
        read(write_dataset(tmp_path / "set", version, kind="image"), frames=12, held_out=4)
    )


def test_both_versions_give_the_same_draw_and_another_seed_gives_another(tmp_path):
    made = {
        version: write_dataset(tmp_path / version, version, kind="image") for version in VERSIONS
    }
    first, second = (read(made[version], frames=9, held_out=3) for version in VERSIONS)
    assert first.record.sha256 == second.record.sha256 and len(first.record.sha256) == 64
    assert (
        first.record.bytes
        == second.record.bytes
        == 12 * (2 * 48 * 64 * 3 + 6 * 4)
        + sum(len(s.task) for s in (*first.calibration, *first.held_out))
    )
    assert (first.record.kind, first.record.frames, first.record.episodes) == ("dataset", 12, 4)
    assert read(made["v3.0"], frames=9, held_out=3, seed=1).record.sha256 != first.record.sha256
    assert (
        read(made["v3.0"], ("front", "wrist"), frames=9, held_out=3).record.sha256
        != first.record.sha256
    )


def test_frames_are_spread_over_tasks_then_episodes_then_time():
    episodes = {i: (100, ("a",) if i < 2 else ("b",)) for i in range(40)}
    calibration, held_out = choose_frames(episodes, 32, 8, seed=0)
    assert not calibration.keys() & held_out.keys()
    assert sum(map(len, calibration.values())) == 32 and sum(map(len, held_out.values())) == 8
    assert {
        tuple(sorted(Counter(episodes[n][1][0] for n in part).items()))
        for part in (calibration, held_out)
    } == {
        (("a", 2), ("b", 16)),
        (("b", 8),),
    }
    # Half of the frames for half of the tasks
    assert [len(calibration[n]) for n in (0, 1)] == [
        8,
        8,
    ]
    single = sorted(frames[0] for frames in calibration.values() if len(frames) == 1)
    assert single[0] < 20 and single[-1] >= 80 and max(b - a for a, b in pairwise(single)) < 20
    assert all(5 < b - a < 20 for n in (0, 1) for a, b in pairwise(calibration[n]))


def test_an_episode_that_is_short_gives_what_it_has_and_the_others_more():
    calibration, _ = choose_frames(
        {0: (3, ()), 1: (3, ()), 2: (3, ()), 3: (0, ()), 4: (90, ())}, 20, 1, seed=2
    )
    assert sum(map(len, calibration.values())) == 20
    assert all(frames == [0, 1, 2] for number, frames in calibration.items() if number != 4)
    assert 3 not in calibration


def test_of_a_single_episode_the_end_is_held_out(tmp_path):
    drawn = read(write_dataset(tmp_path / "set", episodes=[(100, "Pick.")]), frames=32, held_out=8)
    require_right(drawn, [(100, "Pick.")])
    assert (len(drawn.calibration), len(drawn.held_out), drawn.record.episodes) == (32, 8, 1)
    assert (
        max(s.state[0] for s in drawn.calibration) < 80 <= min(s.state[0] for s in drawn.held_out)
    )


def test_a_small_dataset_gives_all_it_has(tmp_path):
    drawn = read(write_dataset(tmp_path / "set", episodes=[(1, "Pick."), (1, "Place.")]))
    assert (len(drawn.calibration), len(drawn.held_out)) == (1, 1)


@pytest.mark.parametrize("lengths", [(5, 5), (2,), (0, 9)])
def test_neither_part_is_ever_empty(lengths):
    for frames, held_out in ((1, 9), (9, 1)):
        assert all(
            choose_frames({i: (n, ()) for i, n in enumerate(lengths)}, frames, held_out, seed=0)
        )


def test_no_task_is_held_out_alone_where_others_have_episodes_to_spare():
    episodes = {i: (10, ("a",) if i == 0 else ("b",)) for i in range(9)}
    assert all(0 in choose_frames(episodes, 8, 2, seed)[0] for seed in range(9))


class Counted(Progress):
    """Keeps what is counted."""

    def __init__(self, say):
        super().__init__(say)
        self.counts = []

    def count(self, done, total):
        self.counts.append((done, total))


def test_what_is_read_is_counted_and_the_outcome_is_told_once(made):
    said = []
    progress = Counted(said.append)
    read(made["v2.1"], frames=9, held_out=3, progress=progress)
    assert said == [
        f"reading {made['v2.1']}",
        "9 observations to calibrate with, 3 to judge by, from 4 episodes with 2 tasks",
    ]
    done = [done for done, _ in progress.counts]
    assert done == sorted(set(done)) and len(done) == 4
    assert progress.counts[-1] == (12, 12)


# Recordings and drawings


def test_a_recording_is_one_episode_of_what_the_policy_saw(tmp_path):
    drawn = read(record(tmp_path / "run"), frames=8, held_out=2)
    assert (drawn.record.kind, drawn.record.frames, drawn.record.episodes) == ("recording", 10, 1)
    for i, sample in enumerate((*drawn.calibration, *drawn.held_out)):
        seen = some_chunk(seed=i).request
        assert all(np.array_equal(sample.images[c], seen.images[c]) for c in ("front", "wrist"))
        assert (
            np.array_equal(sample.state, seen.state.astype(np.float32))
            and sample.state.dtype == np.float32
        )
        assert sample.task == "Push."


def test_a_recording_that_does_not_fit_or_is_damaged_is_refused(tmp_path):
    folder = record(tmp_path / "run")
    assert list(read(folder, ["wrist"]).calibration[0].images) == ["wrist"]
    with pytest.raises(ObservationsError, match=r"run has no camera top \(found front, wrist\)"):
        read(folder, ("front", "top"))
    with pytest.raises(
        ObservationsError,
        match=r"run: the state in frame 0 of .* is \[.*\], expected 7 finite numbers",
    ):
        read(folder, state_dim=7)
    (folder / "chunks/000003.npz").write_bytes(b"PK")
    with pytest.raises(SettingsError, match=r"000003\.npz is damaged"):
        read(folder)
    with pytest.raises(ObservationsError, match="has 1 frames, expected at least 2, better 40"):
        read(record(tmp_path / "short", chunks=1))
    (folder / "run.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"run\.json has format and version"):
        read(folder)


def test_synthetic_observations_differ_in_everything_and_come_with_a_warning():
    said = []
    statistics = {"mean": [100, 0, 0, 0, 0, 0], "std": [1, 1, 1, 1, 1, 0]}
    drawn = read(
        "synthetic", frames=6, held_out=2, statistics=statistics, progress=Progress(said.append)
    )
    assert said[0].startswith("warning: synthetic calibration")
    assert (drawn.record.kind, drawn.record.frames, drawn.record.episodes) == ("synthetic", 8, 0)
    assert (len(drawn.calibration), len(drawn.held_out)) == (6, 2)
    samples = [*drawn.calibration, *drawn.held_out]
    assert len({image.tobytes() for s in samples for image in s.images.values()}) == 16
    assert len({s.state.tobytes() for s in samples}) == 8
    assert [s.task for s in samples] == TASKS * 4
    assert all(
        90 < s.state[0] < 110 and s.state[5] == 0 and s.state.dtype == np.float32 for s in samples
    )
    assert (
        read("synthetic", frames=6, held_out=2, statistics=statistics).record.sha256
        == drawn.record.sha256
    )
    assert (
        read("synthetic", frames=6, held_out=2, statistics=statistics, seed=1).record.sha256
        != drawn.record.sha256
    )
    assert len(read("synthetic", state_dim=3, frames=2, held_out=1).calibration[0].state) == 3


# What is refused


def edit_info(change):
    def damage(root):
        info = json.loads((root / "meta/info.json").read_text())
        change(info)
        write_json(root / "meta/info.json", info)

    return damage


def edit_rows(change, pattern="data/**/*.parquet"):
    def damage(root):
        for path in sorted(root.glob(pattern)):
            write_parquet(
                path,
                [row for row in pq.read_table(path, partitioning=None).to_pylist() if change(row)],
            )

    return damage


def to_videos(change):
    def damage(root):
        for path in root.rglob("*.mp4"):
            path.write_bytes(change(path.read_bytes()))

    return damage


def remove(pattern):
    return lambda root: [path.unlink() for path in root.glob(pattern)]


def film_anew(count, fps):
    return lambda root: [
        write_video(path, range(count), "front", fps) for path in root.rglob("*.mp4")
    ]


DAMAGE = {
    "another version": (
        edit_info(lambda i: i.update(codebase_version="v9.0")),
        "'v9.0', expected v2.0, v2.1, v3.0",
    ),
    "no version": (
        edit_info(lambda i: i.pop("codebase_version")),
        r"meta is damaged \(KeyError\('codebase",
    ),
    "no rate": (edit_info(lambda i: i.update(fps=None)), r"meta is damaged \(TypeError"),
    "rate 0": (edit_info(lambda i: i.update(fps=0)), r"meta is damaged \(ZeroDivisionError"),
    "no json": (
        lambda root: (root / "meta/info.json").write_text("{"),
        r"meta is damaged \(JSONDecodeError",
    ),
    "no cameras": (
        edit_info(lambda i: [i["features"].pop(f"observation.images.{c}") for c in CAMERAS]),
        r"no camera wrist, front \(found none\)",
    ),
    "no info": (remove("meta/info.json"), r"has neither meta/info\.json nor run\.json: give"),
    "no tasks": (
        remove("meta/tasks.*"),
        r"tasks\.(parquet is missing|jsonl\b.*): copy the dataset again",
    ),
    "a task without a text": (
        edit_rows(lambda row: row.update(task_index=7) or True),
        r"the tasks \{7\}, meta/ only \[0, 1\]",
    ),
    "no data": (remove("data/**/*.parquet"), r"\.parquet is missing: copy"),
    "damaged data": (
        lambda root: [p.write_bytes(b"PAR1") for p in root.glob("data/**/*.parquet")],
        r"\.parquet cannot be read",
    ),
    "frames lost": (
        edit_rows(lambda row: row["frame_index"] < 1),
        r"parquet lacks frames \[\d.* of episode \d, expected",
    ),
    "NaN": (
        edit_rows(
            lambda row: row.update({"observation.state": [0.0, float("nan"), 0, 0, 0, 0]}) or True
        ),
        r"the state in frame \d+ of episode \d is \[0.0, nan, .*\], expected 6 finite numbers: ",
    ),
    "narrow rows": (
        edit_rows(lambda row: row.update({"observation.state": [0.0] * 5}) or True),
        r"is \[0.0, 0.0, 0.0, 0.0, 0.0\], expected 6 finite numbers: ",
    ),
    "no videos": (remove("videos/**/*.mp4"), r"\.mp4 is missing: copy"),
    "no index in the video": (
        to_videos(lambda data: data[:500]),
        r"\.mp4 cannot be decoded \(End of file\)",
    ),
    "cut videos": (
        to_videos(lambda data: data[: len(data) * 2 // 3]),
        r"\.mp4 (cannot be decoded|has no frame at)",
    ),
    "text for video": (
        to_videos(lambda data: b"not a video"),
        r"\.mp4 cannot be decoded \(Invalid data",
    ),
    "short videos": (film_anew(5, FPS), r"\.mp4 has no frame at \d+\.\d+ s, but the data has"),
    "slow videos": (
        film_anew(100, FPS // 2),
        r"\.mp4 has no frame at \d+\.[13579]00 s, but the data has",
    ),
    "scrambled videos": (
        to_videos(lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
        r"\.mp4 cannot be decoded \(Invalid data",
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_dataset_is_refused_in_one_line(made, tmp_path, version, damage, message):
    root = tmp_path / "set"
    shutil.copytree(made[version], root)
    read(root, frames=4, held_out=2)
    damage(root)
    with pytest.raises(ObservationsError, match=message) as caught:
        read(root)
    assert "\n" not in str(caught.value)


def test_a_dataset_of_another_robot_is_refused_with_all_that_differs(made):
    with pytest.raises(
        ObservationsError,
        match=r"no camera top \(found front, wrist\) and a state of shape \[6\], exp",
    ):
        read(made["v3.0"], ("front", "top"), state_dim=7)


def test_a_picture_that_is_none_is_refused(tmp_path):
    root = write_dataset(tmp_path / "set", kind="image")
    for cell in ({"bytes": b"GIF", "path": "a.png"}, {"bytes": None, "path": "a.png"}):
        edit_rows(lambda row, cell=cell: row.update({"observation.images.front": cell}) or True)(
            root
        )
        with pytest.raises(
            ObservationsError,
            match=r"parquet, episode \d, observation.images.front holds no whole picture",
        ):
            read(root)


def test_too_few_frames_are_refused(tmp_path):
    with pytest.raises(
        ObservationsError, match="set has 1 frames, expected at least 2, better 40: record more"
    ):
        read(write_dataset(tmp_path / "set", episodes=[(1, "Pick.")]))


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_a_source_that_is_not_there_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ObservationsError, match=f"{name} is not there: give a folder, a Hub id"):
        read(name)


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(ObservationsError, match=r"has neither meta/info\.json nor run\.json"):
        read(tmp_path)


# The Hub


def fill_cache(home, dataset):
    folder = home / "hub/datasets--me--cubes"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    shutil.copytree(dataset, folder / "snapshots" / COMMIT)
    return folder / "snapshots" / COMMIT


def read_offline(home):
    """In a process of its own: the library reads its settings when it is imported."""
    line = "from smolvla_edge.quantize.observations.calibration import read_calibration as read\n"
    line += "try: print(read('me/cubes', ['front'], 6, [], frames=9, held_out=3).record.sha256)\n"
    line += "except Exception as e: print(e)"
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, env=environment, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_cached_hub_dataset_is_read_offline_and_what_is_not_cached_is_named(made, tmp_path):
    assert read_offline(tmp_path).startswith(
        "me/cubes is no folder here, and cannot be had from the Hub ("
    )
    snapshot = fill_cache(tmp_path, made["v3.0"])
    assert (
        read_offline(tmp_path) == read(made["v3.0"], ["front"], frames=9, held_out=3).record.sha256
    )
    shutil.rmtree(snapshot / "videos")
    assert read_offline(tmp_path).startswith("videos/observation.images.front/chunk-000/file-00")


@pytest.mark.parametrize("version", VERSIONS)
def test_of_a_hub_dataset_only_meta_and_the_files_of_chosen_episodes_are_fetched(
    made, tmp_path, monkeypatch, version
):
    asked = []

    def snapshot_download(repo, *, repo_type, allow_patterns):
        assert (repo, repo_type, allow_patterns) == ("me/cubes", "dataset", ["meta/*"])
        shutil.copytree(made[version] / "meta", tmp_path / COMMIT / "meta")
        return str(tmp_path / COMMIT)

    def hf_hub_download(repo, name, *, repo_type, revision):
        assert (repo, repo_type, revision) == ("me/cubes", "dataset", COMMIT)
        asked.append(name)
        target = tmp_path / COMMIT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(made[version] / name, target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    drawn = read("me/cubes", ["front"], frames=1, held_out=1)
    assert (drawn.record.source, drawn.record.episodes) == ("me/cubes", 2)
    names = [Path(name).parts[0] for name in sorted(set(asked))]
    assert Counter(names) in ({"data": 2, "videos": 2}, {"data": 1, "videos": 1})
    assert not any("wrist" in name for name in asked)


@pytest.mark.parametrize("few", [(8, 2), (10, 2), (3, 7)])
def test_what_is_held_out_is_never_calibrated_with_whatever_is_asked_for(few):
    for episodes in (dict.fromkeys(range(23), (30, ("Pick.",))), {7: (100, ("Pick.",))}):
        calibrated, _ = choose_frames(episodes, 32, 8, 0)
        _, judged = choose_frames(episodes, *few, 0)
        pairs = [
            {(number, i) for number, frames in part.items() for i in frames}
            for part in (calibrated, judged)
        ]
        assert not pairs[0] & pairs[1]
    drawn = [
        read_calibration("synthetic", ["front"], 6, ["Go."], frames=n, held_out=k)
        for n, k in ((32, 8), few)
    ]
    pictures = [
        {s.images["front"].tobytes() for s in part}
        for part in (drawn[0].calibration, drawn[1].held_out)
    ]
    assert not pictures[0] & pictures[1]
