"""The watch over the cameras: what must not reach the policy, and what must not be held against a
camera."""

import errno
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from smolvla_edge.core.errors import CameraError
from smolvla_edge.devices.cameras import camera_watch
from smolvla_edge.devices.cameras.camera import Frame
from smolvla_edge.devices.cameras.camera_watch import CameraWatch
from smolvla_edge.devices.cameras.file_camera import ImageFileCamera
from smolvla_edge.devices.cameras.sources import open_camera
from support.faulty_arm import FaultyArm

pytestmark = pytest.mark.arm

TICK_S = 1 / 32  # exact, so that sums of it are


@dataclass
class Clock:
    now_s: float = 1000.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(camera_watch, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def scene(seed):
    """What a camera looks at: big patches of grey."""
    patches = np.random.default_rng(seed).integers(0, 200, (6, 8, 1), np.uint8)
    return np.repeat(np.repeat(np.repeat(patches, 8, 0), 8, 1), 3, 2)  # [48, 64, 3]


def blend(picture, other, share):
    """`share` of the first, the rest of the second."""
    return (share * picture + (1 - share) * other).astype(np.uint8)


@dataclass
class SceneCamera:
    """A camera on the fake clock: `picture` with a little noise, `fps` times a second."""

    name: str
    clock: Clock
    picture: np.ndarray
    fps: float = 32.0
    asked_fps: float = 30.0
    has_noise: bool = True
    noise: int = 3
    error: str = ""
    frame: Frame = None
    due_s: float = 0.0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def open(self): ...

    def close(self): ...

    def latest(self):
        if self.error:
            raise CameraError(self.error)
        if self.frame is None or (self.fps and self.clock.now_s >= self.due_s):
            noise = (
                self.random.integers(0, self.noise, self.picture.shape, np.uint8)
                if self.noise
                else 0
            )
            self.frame = Frame(
                self.picture + noise, self.clock.now_s, self.frame.number + 1 if self.frame else 1
            )
            self.due_s = max(self.due_s, self.clock.now_s - TICK_S) + 1 / self.fps
        return self.frame


def run(watch, clock, seconds):
    """-> the problems each camera had in that time, in order, each once."""
    problems = {}
    for _ in range(round(seconds / TICK_S)):
        clock.now_s += TICK_S
        for name, view in watch.look().items():
            problems.setdefault(name, [])
            if view.problem not in problems[name]:
                problems[name].append(view.problem)
    return problems


@pytest.fixture
def front(clock):
    return SceneCamera("front", clock, scene(1))


@pytest.fixture
def wrist(clock):
    return SceneCamera("wrist", clock, scene(2))


@pytest.fixture
def watch(front, wrist):
    return CameraWatch([front, wrist])


def test_healthy_cameras_have_no_problem_and_no_warning(watch, front, clock):
    assert run(watch, clock, 20) == {"front": [""], "wrist": [""]}
    assert watch.warnings() == []
    view = watch.look()["front"]
    assert view.image is front.frame.image and view.time_s == front.frame.time_s


def test_a_camera_without_new_pictures_is_stalled_until_they_come_again(watch, wrist, clock):
    run(watch, clock, 1)
    wrist.fps = 0
    assert run(watch, clock, camera_watch.STALE_S) == {"front": [""], "wrist": [""]}
    assert watch.look()["wrist"].problem == ""
    problems = run(watch, clock, 5)
    assert problems["front"] == [""] and problems["wrist"] == [
        "stalled: no new picture for more than 0.5 s"
    ]
    wrist.fps = 32.0
    assert run(watch, clock, 10)["wrist"] == [""]
    assert watch.warnings() == [], "a pause is no slow camera"


def test_the_same_picture_with_new_times_is_frozen_after_a_second(watch, front, clock):
    run(watch, clock, 1)
    front.noise = 0
    assert run(watch, clock, camera_watch.FROZEN_S)["front"] == [""]
    assert run(watch, clock, 1)["front"] == ["frozen: the same picture again and again"]
    front.noise = 3
    assert run(watch, clock, 2)["front"] == [""]


def test_few_equal_pictures_are_not_frozen_however_long_they_last(watch, front, clock):
    front.fps, front.noise = 2.5, 0
    assert run(watch, clock, 0.4 * (camera_watch.FROZEN_PICTURES - 1))["front"] == [""]
    assert "frozen" in run(watch, clock, 0.9)["front"][-1]


def test_one_pixel_in_an_unsampled_row_tells_a_live_camera(clock, front):
    watch = CameraWatch([front])
    front.noise = 0
    for n in range(96):
        front.picture = scene(1)
        front.picture[17, 5, 1] += n % 2
        clock.now_s += TICK_S
        assert watch.look()["front"].problem == ""


def test_a_file_may_repeat_its_pictures(clock, front, tmp_path):
    front.has_noise, front.noise = False, 0
    assert run(CameraWatch([front]), clock, 5)["front"] == [""]


def test_a_still_picture_is_never_stalled_frozen_or_slow(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "still.png"), scene(1))
    camera = open_camera("front", str(tmp_path / "still.png"))
    assert isinstance(camera, ImageFileCamera)
    watch = CameraWatch([camera])
    end_s = time.monotonic() + camera_watch.FROZEN_S + 0.5
    while time.monotonic() < end_s:
        assert watch.look()["front"].problem == ""
        time.sleep(0.01)
    assert watch.warnings() == []


def test_another_size_is_a_problem_until_it_is_the_old_one(watch, front, clock):
    run(watch, clock, 1)
    small, front.picture = scene(1)[:24, :32], scene(1)
    front.picture = small
    assert run(watch, clock, 2)["front"] == ["resized: 32 x 24, was 64 x 48"]
    front.picture = scene(1)
    assert run(watch, clock, 2)["front"] == [""]


def test_a_camera_that_fails_keeps_its_last_picture_and_says_why(watch, front, wrist, clock):
    run(watch, clock, 1)
    before = front.frame
    front.error = "camera front: 10 reads in a row failed"
    problems = run(watch, clock, 3)
    assert problems == {"front": ["failed: camera front: 10 reads in a row failed"], "wrist": [""]}
    assert watch.look()["front"].image is before.image


def test_a_camera_that_shows_nothing_at_all_is_refused_at_the_start(front):
    front.error = "camera front: cannot be opened"
    with pytest.raises(CameraError, match="cannot be opened"):
        CameraWatch([front])


@pytest.mark.parametrize(("fps", "asked_fps", "expected"), [(5, 30, 15), (20, 60, 30), (9, 0, 10)])
def test_a_slow_camera_is_told_once_with_both_numbers(front, clock, fps, asked_fps, expected):
    front.fps, front.asked_fps = fps, asked_fps
    watch = CameraWatch([front])
    assert run(watch, clock, 15)["front"] == [""], "slow is a warning, not a problem"
    (warning,) = watch.warnings()
    found = re.match(
        r"camera 'front' is slow: (.*) pictures a second, expected (.*?)\. Check", warning
    )
    assert float(found[1]) == pytest.approx(fps, rel=0.05) and float(found[2]) == expected
    run(watch, clock, 10)
    assert watch.warnings() == []


@pytest.mark.parametrize(("fps", "asked_fps"), [(14.8, 30), (11, 0), (10, 10)])
def test_a_camera_that_is_fast_enough_is_not_called_slow(watch, front, clock, fps, asked_fps):
    front.fps, front.asked_fps = fps, asked_fps
    run(watch, clock, 30)
    assert watch.warnings() == []


def test_a_loop_slower_than_its_cameras_finds_none_slow(watch, front, wrist, clock):
    for _ in range(400):
        for _ in range(7):
            clock.now_s += TICK_S
            front.latest()
            wrist.latest()
        watch.look()
    assert watch.warnings() == []


def test_cameras_swapped_between_runs_are_named(front, wrist, clock, tmp_path):
    path = tmp_path / "cameras.npz"
    watch = CameraWatch([front, wrist])
    assert watch.compare_with(path) == []
    watch.remember(path)
    assert [p.name for p in tmp_path.iterdir()] == ["cameras.npz"]
    clock.now_s += 1
    assert watch.compare_with(path) == []
    # The wrist camera has moved since: the other one alone gives it away.
    front.picture, wrist.picture = scene(3), front.picture
    clock.now_s += 1
    assert watch.compare_with(path) == [
        "cameras 'front' and 'wrist' look swapped since the last run"
    ]
    for wrist.picture in (scene(4), blend(scene(1), scene(4), 0.4)):
        clock.now_s += 1
        assert watch.compare_with(path) == [], "both see something new"


def test_a_memory_that_cannot_be_written_leaves_the_old_one(watch, tmp_path, monkeypatch):
    path = tmp_path / "cameras.npz"
    watch.remember(path)
    whole = path.read_bytes()
    write_bytes = Path.write_bytes

    def full_disk(target, data):
        write_bytes(target, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        watch.remember(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["cameras.npz"]


def test_nothing_is_claimed_of_cameras_that_look_alike_or_were_not_there(
    front, wrist, clock, tmp_path
):
    path = tmp_path / "cameras.npz"
    wrist.picture = front.picture
    CameraWatch([front, wrist]).remember(path)
    front.picture = scene(2)
    clock.now_s += 1
    assert CameraWatch([front, wrist]).compare_with(path) == []
    wrist.name = "top"
    assert CameraWatch([front, wrist]).compare_with(path) == []


def test_a_memory_that_cannot_be_read_counts_as_none(watch, front, tmp_path):
    path = tmp_path / "cameras.npz"
    watch.remember(path)
    whole = path.read_bytes()
    broken = [b"", b"text", whole[: len(whole) // 2], whole.replace(b"NUMPY", b"NUMPX")]
    for content in broken:
        path.write_bytes(content)
        assert watch.compare_with(path) == []
    for names, thumbnails in (
        (["front"], np.zeros((2, 192))),
        (["front", "wrist"], np.zeros((2, 5))),
        ([1], ["x"]),
    ):
        np.savez(path, names=names, thumbnails=thumbnails)
        assert watch.compare_with(path) == []
    np.save(path.with_suffix(".npy"), np.zeros(3))
    assert watch.compare_with(path.with_suffix(".npy")) == []


def test_every_fault_of_the_virtual_cameras_is_told_and_passes():
    with FaultyArm(cameras=("front", "wrist"), width=160, height=120) as arm:
        cameras = [open_camera(name, source) for name, source in arm.camera_sources.items()]
        watch = CameraWatch(cameras)

        def wait_for(problem):
            deadline = time.monotonic() + 30
            while [view.problem.partition(":")[0] for view in watch.look().values()] != [
                "",
                problem,
            ]:
                assert time.monotonic() < deadline, problem
                time.sleep(0.01)

        wait_for("")
        arm.camera("wrist", "stall")
        wait_for("stalled")
        arm.camera("wrist", "freeze")
        wait_for("frozen")
        arm.camera("wrist", "live")
        wait_for("")
        arm.camera("wrist", "slow", 4.0)
        deadline = time.monotonic() + 30
        while not (warnings := watch.warnings()):
            assert time.monotonic() < deadline
            watch.look()
            time.sleep(0.01)
        assert any("'wrist' is slow" in w for w in warnings)
        for camera in cameras:
            camera.close()
