"""CSI cameras: `gst-launch-1.0` and its pipe. The program is a stand-in, or GStreamer's own with a
test picture."""

import os
import shutil
import sys
import time

import pytest

from smolvla_edge.core.errors import CameraError
from smolvla_edge.devices.cameras.csi_camera import CsiCamera
from smolvla_edge.devices.cameras.sources import open_camera

GSTREAMER = shutil.which("gst-launch-1.0")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a Python program on the PATH as gst-launch-1.0; it has the words of the pipeline and the
    pipe."""

    def put(body):
        path = tmp_path / "bin" / "gst-launch-1.0"
        path.parent.mkdir()
        head = f"#!{sys.executable}\nimport os, sys, time\nwords = sys.argv[1:]\n"
        path.write_text(f"{head}pipe = int(words[-1].removeprefix('fd='))\n{body}")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return put


SHOW = """
print("GST_ARGUS: Creating output stream", flush=True)
for n in range(1000):
    os.write(pipe, bytes([200, 30, n % 256]) * 8 * 6)
    time.sleep(0.005)
"""


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_pictures_are_rgb_new_and_end_with_the_camera(program):
    program(SHOW)
    camera = CsiCamera("wrist", "csi:0", 8, 6)
    camera.open()
    first = camera.latest()
    assert first.image.shape == (6, 8, 3)
    assert first.image[0, 0, :2].tolist() == [200, 30]
    assert 0 <= time.monotonic() - first.time_s < 5
    wait_for(lambda: camera.latest().number > first.number)
    camera.close()
    assert camera._process.returncode is not None
    assert not camera._thread.is_alive()


def test_the_pipeline_asks_for_the_sensor_size_and_rate(program):
    program("print(words)\nsys.exit(1)")
    with pytest.raises(CameraError, match=r"sensor-id=1.*width=1280,height=720,framerate=15/1"):
        CsiCamera("wrist", "csi:1", 1280, 720, 15.0).open()


def test_a_program_that_ends_says_why_and_what_to_do(program):
    program(
        f"{SHOW.replace('1000', '3')}\nprint('ERROR: No cameras available', file=sys.stderr)\nsys.exit(4)"
    )
    camera = CsiCamera("wrist", "csi:0", 8, 6)
    camera.open()
    with pytest.raises(
        CameraError,
        match=r"wrist \(csi:0\).*status 4.*No cameras available.*restart nvargus-daemon",
    ):
        wait_for(lambda: not camera.latest())
    camera.close()


def test_a_sensor_that_shows_nothing_is_told_and_its_program_ended(program, monkeypatch):
    monkeypatch.setattr("smolvla_edge.devices.cameras.camera.OPEN_LIMIT_S", 0.5)
    monkeypatch.setattr("smolvla_edge.devices.cameras.csi_camera.STOP_LIMIT_S", 0.5)
    program("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)")
    camera = CsiCamera("wrist", "csi:0", 8, 6)
    with pytest.raises(CameraError, match=r"no picture from csi:0 in 0\.5 s.*nvargus-daemon"):
        camera.open()
    assert camera._process.wait(1) == -9


def test_without_gstreamer_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        CameraError, match=r"needs gst-launch-1\.0, not found.*apt-get install gstreamer1\.0-tools"
    ):
        open_camera("wrist", "csi:0")


@pytest.mark.skipif(GSTREAMER is None, reason="needs gst-launch-1.0")
@pytest.mark.parametrize("width", [64, 65])  # of 65, the rows are padded
def test_gstreamer_takes_the_pipeline(program, width):
    """All of it but the elements that only a Jetson has."""
    program(f"""
line = " ".join(words).replace("nvarguscamerasrc sensor-id=0", "videotestsrc pattern=smpte is-live=true")
line = line.replace("(memory:NVMM)", "").replace("nvvidconv", "videoconvert")
os.set_inheritable(pipe, True)
os.execv({GSTREAMER!r}, ["gst-launch-1.0", *line.split()])
""")
    camera = CsiCamera("wrist", "csi:0", width, 48, 30.0)
    camera.open()
    frames = [camera.latest()]
    while len(frames) < 5:
        wait_for(lambda: camera.latest().number > frames[-1].number)
        frames.append(camera.latest())
    camera.close()
    # White, yellow, cyan, green, magenta, red, blue
    expected = [
        "111",
        "110",
        "011",
        "010",
        "101",
        "100",
        "001",
    ]
    for frame in frames:
        assert frame.image.shape == (48, width, 3)
        bars = frame.image[10, [4, 12, 22, 31, 40, 49, 60]] > 96
        assert ["".join(str(int(bit)) for bit in bar) for bar in bars] == expected
    assert camera._process.returncode is not None
