"""Cameras: colours, ages, and errors that do not wait."""

import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from smolvla_edge.core.errors import CameraError
from smolvla_edge.devices.cameras.file_camera import ImageFileCamera, VideoFileCamera
from smolvla_edge.devices.cameras.shared_frame import SharedFrameCamera, write_frame
from smolvla_edge.devices.cameras.sources import open_camera
from smolvla_edge.devices.cameras.usb_camera import UsbCamera, _taken_s

RED_RGB = (200, 30, 20)


def red_picture(width=64, height=48):
    return np.full((height, width, 3), RED_RGB, np.uint8)


def write_video(path, pictures, fps=30):
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter.fourcc(*"MJPG"), fps, (64, 48)
    )
    assert writer.isOpened()
    for picture in pictures:
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    writer.release()
    return str(path)


@pytest.fixture
def video(tmp_path):
    """Thirty red pictures. OpenCV opens a video as it opens a device."""
    return write_video(tmp_path / "red.avi", [red_picture()] * 30)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_picture_file_is_a_camera_in_rgb(tmp_path):
    path = tmp_path / "red.png"
    cv2.imwrite(str(path), cv2.cvtColor(red_picture(), cv2.COLOR_RGB2BGR))
    camera = open_camera("front", str(path))
    assert isinstance(camera, ImageFileCamera)
    frame = camera.latest()
    assert camera.name == "front"
    assert np.array_equal(frame.image, red_picture())
    assert 0 <= time.monotonic() - frame.time_s < 1
    assert camera.latest().time_s > frame.time_s


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    cut = cv2.imencode(".png", red_picture())[1].tobytes()[:30]
    for content in (b"", b"text", cut, b"\0" * 5000):
        for name in ("front.png", "front.mp4"):
            path = tmp_path / name
            path.write_bytes(content)
            before = time.monotonic()
            with pytest.raises(CameraError, match=r"front.*no picture.*OpenCV reads"):
                open_camera("front", str(path))
            assert time.monotonic() - before < 7


@pytest.mark.parametrize(
    ("stamp_s", "believed"), [(0.08, True), (0.0, True), (-5.0, False), (1e6, False)]
)
def test_a_picture_is_as_old_as_the_driver_says_where_its_clock_is_ours(stamp_s, believed):
    now_s, told = time.monotonic(), SimpleNamespace(get={cv2.CAP_PROP_POS_MSEC: 0.0}.get)
    assert _taken_s(told, now_s) == now_s  # no stamp
    told.get = {cv2.CAP_PROP_POS_MSEC: 1e3 * (now_s - stamp_s)}.get
    assert now_s - _taken_s(told, now_s) == pytest.approx(stamp_s if believed else 0.0, abs=1e-6)


def test_a_video_file_is_a_camera_that_starts_again_and_is_never_too_fast(tmp_path):
    path = write_video(
        tmp_path / "steps.avi", [np.full((48, 64, 3), 20 * n, np.uint8) for n in range(10)], fps=40
    )
    camera = open_camera("front", path)
    assert isinstance(camera, VideoFileCamera) and camera.asked_fps == 40 and not camera.has_noise
    frames = [camera.latest()]
    while frames[-1].number < 24:
        wait_for(lambda: camera.latest().number != frames[-1].number)
        frames.append(camera.latest())
    camera.close()
    assert all(abs(int(f.image[24, 32, 0]) - 20 * ((f.number - 1) % 10)) <= 3 for f in frames)
    for before, after in pairwise(frames):
        assert after.time_s - before.time_s > (after.number - before.number) / 40 - 1e-6


def test_a_video_file_is_shown_when_it_is_due_and_ends_with_its_camera(video):
    threads = threading.active_count()
    camera = open_camera("front", video)
    assert threading.active_count() == threads + 1
    assert camera.latest().image.shape == (48, 64, 3)
    for _ in range(5):
        number = camera.latest().number
        wait_for(lambda: camera.latest().number != number)  # noqa: B023  (it is called before the next round)
        assert camera.latest().time_s <= time.monotonic()
    camera.close()
    assert threading.active_count() == threads


def test_a_video_file_with_an_absurd_rate_is_shown_at_thirty(tmp_path):
    camera = open_camera("front", write_video(tmp_path / "fast.avi", [red_picture()] * 3, fps=1000))
    assert camera.asked_fps == 30
    camera.close()


def test_a_video_file_that_disappears_is_reported(video):
    camera = open_camera("front", video)
    Path(video).unlink()
    with pytest.raises(CameraError, match="no video"):
        wait_for(lambda: not camera.latest())
    camera.close()


def test_a_captured_picture_is_rgb_and_carries_its_time(video):
    camera = UsbCamera("front", video, 64, 48)
    camera.open()
    frame = camera.latest()
    assert frame.image.shape == (48, 64, 3) and frame.image.dtype == np.uint8
    assert np.abs(frame.image.astype(int) - RED_RGB).max() < 12
    assert 0 <= time.monotonic() - frame.time_s < 5
    camera.close()
    camera.close()


def test_a_camera_that_stops_delivering_reports_it(video):
    camera = UsbCamera("front", video, 64, 48)
    camera.open()
    deadline = time.monotonic() + 10
    with pytest.raises(CameraError, match="reads in a row failed"):
        while time.monotonic() < deadline:
            camera.latest()
            time.sleep(0.01)
    camera.close()


def test_pictures_of_another_size_are_refused(video):
    with pytest.raises(CameraError, match="64 x 48 pictures, expected 640 x 480"):
        UsbCamera("front", video).open()


@pytest.mark.parametrize("source", ["/dev/video99", 99, "99"])
def test_a_device_that_is_not_there_is_refused_at_once(source):
    before = time.monotonic()
    with pytest.raises(CameraError, match=r"no /dev/video99\. Video devices here"):
        open_camera("front", source)
    assert time.monotonic() - before < 1


def test_a_device_that_is_no_camera_is_refused_in_bounded_time(tmp_path, capfd):
    path = tmp_path / "video"
    path.write_bytes(b"no video at all")
    before = time.monotonic()
    with pytest.raises(CameraError, match="cannot be opened"):
        UsbCamera("front", str(path)).open()
    assert time.monotonic() - before < 9
    capfd.readouterr()


@pytest.mark.parametrize("source", ["", "nowhere.png", "http://camera/stream", "/dev/ttyACM0"])
def test_an_unknown_source_is_told_what_is_accepted(source):
    with pytest.raises(CameraError, match=r"/dev/video\*.*picture or video file.*sim:<path>"):
        open_camera("front", source)


def test_a_shared_picture_arrives_with_its_time(tmp_path):
    path = tmp_path / "front.frame"
    write_frame(path, red_picture(), 12.5, 1)
    camera = open_camera("front", f"sim:{path}")
    assert isinstance(camera, SharedFrameCamera)
    frame = camera.latest()
    assert np.array_equal(frame.image, red_picture()) and frame.time_s == 12.5
    write_frame(path, red_picture() // 2, 13.0, 2)
    newest = camera.latest()
    assert newest.time_s == 13.0 and newest.number == frame.number + 1
    assert np.array_equal(newest.image, red_picture() // 2) and np.array_equal(
        frame.image, red_picture()
    )
    assert camera.latest() is newest, "a picture that is not new is the same"
    camera.close()
    camera.close()


def test_a_missing_or_foreign_shared_file_is_refused(tmp_path):
    with pytest.raises(CameraError, match="Is the virtual arm running"):
        open_camera("front", f"sim:{tmp_path / 'none'}")
    path = tmp_path / "other"
    for content in (b"", b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(CameraError, match="no shared picture"):
            open_camera("front", f"sim:{path}")
