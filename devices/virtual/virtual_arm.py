"""A virtual SO-101 in a process of its own: a serial port and camera pictures.

In the process that drives it, it would answer only while that process sleeps. The child prints one
line of JSON (port, camera sources), then runs until its standard input ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tty
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ...core.errors import DeviceError
from ...core.process import first_line, module_command
from ..arm.calibration import Calibration, JointCalibration
from ..cameras.shared_frame import write_frame
from .virtual_bus import VirtualBus, servos_at

VIRTUAL_CALIBRATION = Calibration(
    (
        JointCalibration(1, 0, -709, 701, 3301),
        JointCalibration(2, 0, 312, 758, 3292),
        JointCalibration(3, 0, -58, 900, 3100),
        JointCalibration(4, 0, 1024, 851, 3203),
        JointCalibration(5, 0, -1530, 0, 4095),
        JointCalibration(6, 0, 207, 2017, 3480),
    ),
    "the virtual arm",
)
START_LIMIT_S = 30.0
STOP_LIMIT_S = 3.0
MOTION_PERIOD_S = 0.005
PICTURE_PERIOD_S = 1 / 15
PRIORITY = 20  # real-time, above the control loop


class VirtualArm:
    """Starts the process and waits until it is ready. `close` (or leaving the context) ends it.

    cameras: names; virtual_view knows views of "front" and "wrist". width, height: of the pictures.
    pose: where the servos start, [6] raw ticks; the middle of each range if None.
    command: starts the process, without its argument.
    pid: of the process. port: path of its serial port. calibration: what its servos hold.
    camera_sources: {name: source for open_camera}. Raises DeviceError when it does not start.
    """

    def __init__(
        self,
        cameras: Sequence[str] = ("front", "wrist"),
        width: int = 640,
        height: int = 480,
        pose: Sequence[int] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.calibration = VIRTUAL_CALIBRATION
        options = {"cameras": list(cameras), "width": width, "height": height, "pose": pose}
        # A session of its own: Ctrl-C must reach the driver, not the arm it drives.
        self._process = subprocess.Popen(
            [*(command or module_command(__name__)), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self._process.pid
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        try:
            ready = first_line(self._process, START_LIMIT_S)
            if not ready:
                raise DeviceError(
                    f"the virtual arm did not start (exit status {self._process.poll()})."
                )
        except BaseException:
            self.close()
            raise
        self.port: str
        self.camera_sources: dict[str, str]
        self.port, self.camera_sources = json.loads(ready)

    def __enter__(self) -> VirtualArm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, which removes its pictures. May be called again."""
        with suppress(OSError):
            self._to.close()
        self._from.close()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class VirtualCamera:
    """Writes pictures of the arm to `path`, `width` x `height` pixels. name: selects the view."""

    def __init__(self, name: str, path: Path, width: int, height: int) -> None:
        from .virtual_view import VirtualView  # OpenCV: an arm without cameras does not need it

        self._render = VirtualView(name, VIRTUAL_CALIBRATION, width, height).render
        self._path, self._number = path, 0

    def show(self, raw: Sequence[float]) -> None:
        """Write a new picture of the arm at `raw`, [6] ticks."""
        time_s = time.monotonic()
        self._number += 1
        write_frame(self._path, self._render(raw), time_s, self._number)


class VirtualHardware:
    """Passes bytes between a pseudo-terminal and the bus, while a thread draws the pictures."""

    def __init__(self, bus: VirtualBus, cameras: Sequence[VirtualCamera]) -> None:
        self.bus, self._cameras = bus, cameras
        self._master, self._slave = os.openpty()
        # Set both ends raw before a client opens the port, or bytes such as 0x0D are changed. The
        # slave end stays open here, or the master end fails between two clients.
        tty.setraw(self._master)
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.port = os.ttyname(self._slave)
        # The first drawing is slow. Once ready, the arm must answer without a pause.
        self._draw()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._draw_until_stopped)
        self._thread.start()

    def run(self) -> None:
        """Run until standard input ends: the starter has closed it, or has died."""
        while True:
            readable, _, _ = select.select([self._master, 0], [], [], MOTION_PERIOD_S)
            if 0 in readable:
                return
            self.bus.advance(time.monotonic())
            if self._master in readable:
                self.bus.receive(os.read(self._master, 4096))
                # Blocked when nobody reads the port: a real line would lose these bytes too.
                with suppress(BlockingIOError):
                    os.write(self._master, self.bus.due())

    def close(self) -> None:
        """End the drawing. A thread inside OpenCV would abort the process when Python ends."""
        self._stopping.set()
        self._thread.join()

    def _draw(self) -> None:
        raw = [servo.position for servo in self.bus.servos.values()]
        for camera in self._cameras:
            camera.show(raw)

    def _draw_until_stopped(self) -> None:
        due_s = time.monotonic()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            self._draw()
            due_s = max(due_s + PICTURE_PERIOD_S, time.monotonic())


def serve(
    build: Callable[[dict[str, Path], int, int, Sequence[int] | None], VirtualHardware],
) -> None:
    """The process: print the port and the camera sources, then run until standard input ends.

    Reads sys.argv[1], the options as JSON. build: {camera: file}, width, height, pose -> hardware.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Exit instead of dying: the pictures are in memory until somebody removes them.
        signal.signal(number, lambda *_: sys.exit())
    options = json.loads(sys.argv[1])
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="virtual-arm-", dir=in_memory) as folder:
        names = options["cameras"]
        paths = {name: Path(folder) / f"{number}.frame" for number, name in enumerate(names)}
        sources = {name: f"sim:{path}" for name, path in paths.items()}
        hardware = build(paths, options["width"], options["height"], options["pose"])
        try:
            print(json.dumps((hardware.port, sources)), flush=True)
            # Servos answer however busy this machine is. Without the permission, they answer late.
            with suppress(OSError):
                priority = os.sched_param(PRIORITY)
                os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, priority)
            hardware.run()
        finally:
            hardware.close()


def _build(
    paths: dict[str, Path], width: int, height: int, pose: Sequence[int] | None
) -> VirtualHardware:
    bus = VirtualBus(servos_at(VIRTUAL_CALIBRATION, pose), time.monotonic())
    cameras = [VirtualCamera(name, path, width, height) for name, path in paths.items()]
    return VirtualHardware(bus, cameras)


def main() -> None:
    """Entry point of the process. Its argument: JSON of cameras, width, height, pose."""
    serve(_build)
