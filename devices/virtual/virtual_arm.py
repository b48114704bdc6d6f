"""A virtual SO-101 in a process of its own: a serial port and camera pictures.

It is a process of its own because inside the one that drives it, it would answer only when that one sleeps.
`python -m smolvla_edge.devices.virtual.virtual_arm '{"cameras": ["front"], ...}'`, the arguments of VirtualArm, prints one
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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.errors import DeviceError
from ...core.process import first_line, module_command
from ..arm.calibration import Calibration, JointCalibration
from ..cameras.shared_frame import write_frame
from .virtual_bus import VirtualBus

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


class VirtualArm:
    """Starts the process and waits until it is ready; `close` (or leaving the context) ends it.

    pid: of the process. port: path of its serial port. calibration: what its servos hold. camera_sources: {name:
    source for open_camera}. Names with a view of their own: see virtual_view. pose: where the servos start, [6] raw
    ticks; the middle of each range unless given. DeviceError when it does not start.
    """

    program: Sequence[str] = module_command("smolvla_edge.devices.virtual.virtual_arm")

    def __init__(
        self,
        cameras: Sequence[str] = ("front", "wrist"),
        width: int = 640,
        height: int = 480,
        pose: Sequence[int] | None = None,
    ) -> None:
        self.calibration = VIRTUAL_CALIBRATION
        options = {"cameras": list(cameras), "width": width, "height": height, "pose": pose}
        # A session of its own: Ctrl-C must reach the driver, not the arm it drives.
        self._process = subprocess.Popen(
            [*self.program, json.dumps(options)],
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


class VirtualRig:
    """Inside the process: passes bytes between a pseudo-terminal and the bus, while a thread draws the pictures."""

    bus_class = VirtualBus

    def __init__(
        self, pose: Sequence[int] | None, paths: dict[str, Path], width: int, height: int
    ) -> None:
        self.bus = self.bus_class(VIRTUAL_CALIBRATION, time.monotonic(), pose)
        self._master, self._slave = os.openpty()
        # Raw on both ends before anybody opens it, or 0x0D and its like are rewritten on the way. The slave
        # end stays open here, or the master end fails between two clients.
        tty.setraw(self._master)
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.port = os.ttyname(self._slave)
        self._paths, self._numbers = paths, dict.fromkeys(paths, 0)
        if paths:
            from .virtual_view import (
                VirtualView,  # needs OpenCV, which an arm without cameras does not
            )

            self._views = {
                name: VirtualView(name, VIRTUAL_CALIBRATION, width, height) for name in paths
            }
        # The first drawing is slow; once ready, the arm must answer without a pause.
        self._draw()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._draw_on)
        self._thread.start()

    def run(self) -> None:
        """Until standard input ends: the starter has closed it, or has died."""
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
        """End the drawing: a thread inside OpenCV when Python ends would abort the process."""
        self._stopping.set()
        self._thread.join()

    def _draw(self) -> None:
        for name in self._paths:
            self._show(name)

    def _show(self, name: str) -> None:
        """A new picture of this camera."""
        time_s = time.monotonic()
        self._numbers[name] += 1
        write_frame(self._paths[name], self._render(name), time_s, self._numbers[name])

    def _render(self, name: str) -> NDArray[np.uint8]:
        return self._views[name].render([servo.position for servo in self.bus.servos.values()])

    def _draw_on(self) -> None:
        due_s = time.monotonic()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            self._draw()
            due_s = max(due_s + PICTURE_PERIOD_S, time.monotonic())


def main(rig_class: type[VirtualRig] = VirtualRig) -> None:
    """The process. Argument: JSON of cameras, width, height, pose."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # An exit, not a death: the pictures lie in memory until somebody removes them.
        signal.signal(number, lambda *_: sys.exit())
    options = json.loads(sys.argv[1])
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="virtual-arm-", dir=in_memory) as folder:
        paths = {
            name: Path(folder) / f"{number}.frame"
            for number, name in enumerate(options.pop("cameras"))
        }
        rig = rig_class(paths=paths, **options)
        try:
            print(
                json.dumps((rig.port, {name: f"sim:{path}" for name, path in paths.items()})),
                flush=True,
            )
            rig.run()
        finally:
            rig.close()
