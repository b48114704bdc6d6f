"""A virtual SO-101 in a process of its own: a serial port, camera pictures and a record of what it was told.

It is a process of its own because inside the one that drives it, it would answer only when that one sleeps.
`python -m smolvla_edge.devices.virtual_arm '{"cameras": ["front"], ...}'`, the arguments of VirtualArm, prints one
line of JSON (port, camera sources), then answers pickled requests until its standard input ends.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tty
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from .calibration import Calibration, JointCalibration
from .errors import DeviceError
from .shared_frame import write_frame
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
ANSWER_LIMIT_S = 5.0
MOTION_PERIOD_S = 0.005


class VirtualArm:
    """Starts the process and waits until it is ready; `close` (or leaving the context) ends it.

    pid: of the process. port: path of its serial port. calibration: what its servos hold. camera_sources: {name:
    source for open_camera}. Names with a view of their own: see virtual_view. pose: where the servos start, [6] raw
    ticks; the middle of each range unless given. DeviceError when it does not start.

    All other attributes are calls into the process: of a method of VirtualRig, of a method or value of VirtualBus,
    or, with its id first, of a method of a VirtualServo.
    """

    def __init__(
        self,
        cameras: Sequence[str] = ("front", "wrist"),
        width: int = 640,
        height: int = 480,
        fps: float = 15.0,
        pose: Sequence[int] | None = None,
    ) -> None:
        self.calibration = VIRTUAL_CALIBRATION
        options = {"cameras": list(cameras), "width": width, "height": height, "fps": fps, "pose": pose}
        # A session of its own: Ctrl-C must reach the driver, not the arm it drives.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smolvla_edge.devices.virtual_arm", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self._process.pid
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        try:
            ready = self._receive(START_LIMIT_S, lambda output: json.loads(output.readline()))
        except BaseException:
            self.close()
            raise
        self.port: str = ready["port"]
        self.camera_sources: dict[str, str] = ready["cameras"]

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

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return partial(self._ask, name)

    def _ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        try:
            self._to.write(pickle.dumps((name, arguments, named)))
            self._to.flush()
        except (OSError, ValueError) as error:
            raise DeviceError(f"the virtual arm has ended: {error}. Start another.") from error
        answer = self._receive(ANSWER_LIMIT_S, pickle.load)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _receive(self, limit_s: float, load: Callable[[Any], Any]) -> Any:
        if select.select([self._from], [], [], limit_s)[0]:
            with suppress(EOFError, ValueError):  # it has ended
                return load(self._from)
        raise DeviceError(f"the virtual arm said nothing for {limit_s} s (exit status {self._process.poll()}).")


class VirtualRig:
    """Inside the process: pumps bytes between pseudo-terminal and bus, and does what it is asked to."""

    def __init__(self, pose: Sequence[int] | None) -> None:
        self.bus = VirtualBus(VIRTUAL_CALIBRATION, time.monotonic(), pose)
        self.modes: dict[str, tuple[str, float]] = {}
        self._master, self._slave = os.openpty()
        # Raw on both ends before anybody opens it, or 0x0D and its like are rewritten on the way. The slave
        # end stays open here, or the master end fails between two clients.
        tty.setraw(self._master)
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.port = os.ttyname(self._slave)
        self._plugged, self._deaf = True, False

    def run(self) -> None:
        """Until standard input ends: the starter has closed it, or has died."""
        wait_s = MOTION_PERIOD_S
        with suppress(EOFError):
            while True:
                heard = [self._master] if self._plugged and not self._deaf else []
                readable, _, _ = select.select([*heard, 0], [], [], wait_s)
                self.bus.advance(time.monotonic())
                if self._master in readable:
                    self.bus.receive(os.read(self._master, 4096))
                if 0 in readable:
                    answer = pickle.dumps(self._answer(*pickle.load(sys.stdin.buffer)))
                    sys.stdout.buffer.write(answer)
                    sys.stdout.buffer.flush()
                answers = self.bus.due()
                # Blocked when nobody reads the port: a real line would lose these bytes too.
                with suppress(BlockingIOError):
                    if self._plugged:
                        os.write(self._master, answers)
                wait_s = min(MOTION_PERIOD_S, max(0.0, self.bus.next_due_s - time.monotonic()))

    def deaf(self, on: bool) -> None:
        """Stop reading the port, so that its buffer fills; False: read on."""
        self._deaf = on

    def hang_up(self) -> None:
        """Unplug the adapter, for good: the port is gone, the servos go on."""
        if self._plugged:
            self._plugged = False
            os.close(self._slave)
            os.close(self._master)

    def reset(self) -> None:
        """New servos, no faults, live cameras, empty logs, nothing waiting in the port, which stays."""
        self._deaf = False
        with suppress(BlockingIOError):
            while self._plugged:
                os.read(self._master, 65536)
        self.bus.reset(time.monotonic())
        self.modes.clear()

    def camera(self, name: str, mode: str, fps: float = 0.0) -> None:
        """How a camera behaves: "live", "stall" (no new pictures), "freeze" (the same one again and again), "slow"
        (`fps`)."""
        self.modes[name] = mode, fps

    def _answer(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            if hasattr(self, name):
                return getattr(self, name)(*arguments, **named)
            if hasattr(self.bus, name):
                found = getattr(self.bus, name)
                if callable(found):
                    return found(*arguments, **named)
                return list(found) if isinstance(found, deque) else found
            return getattr(self.bus.servos[arguments[0]], name)(*arguments[1:], **named)
        except Exception as error:  # whatever it is, it is the caller's
            return error


class _Pictures:
    """Inside the process: a thread that draws every camera of `rig` into its file."""

    def __init__(self, rig: VirtualRig, paths: dict[str, Path], width: int, height: int, fps: float) -> None:
        from .virtual_view import VirtualView  # needs OpenCV, which an arm without cameras does not

        self._rig, self._paths, self._fps = rig, paths, fps
        self._views = {name: VirtualView(name, VIRTUAL_CALIBRATION, width, height) for name in paths}
        self._images: dict[str, Any] = {}
        self._numbers = dict.fromkeys(paths, 0)
        self._due_s = dict.fromkeys(paths, 0.0)
        # The first drawing is slow; once ready, the arm must answer without a pause.
        self._draw()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """End the drawing: a thread inside OpenCV when Python ends would abort the process."""
        self._stopping.set()
        self._thread.join()

    def _draw(self) -> None:
        """One round: a new picture wherever one is due."""
        raw = [servo.position for servo in self._rig.bus.servos.values()]
        for name, path in self._paths.items():
            time_s = time.monotonic()
            mode, fps = self._rig.modes.get(name, ("live", 0.0))
            if mode == "stall" or (mode == "slow" and time_s < self._due_s[name]):
                continue
            if mode != "freeze":
                self._images[name] = self._views[name].render(raw)
            self._numbers[name] += 1
            write_frame(path, self._images[name], time_s, self._numbers[name])
            # The nearest round that there is.
            self._due_s[name] = time_s + (1 / fps - 0.5 / self._fps if mode == "slow" else 0.0)

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            self._draw()
            due_s = max(due_s + 1 / self._fps, time.monotonic())


def main() -> None:
    """The process. Argument: JSON of cameras, width, height, fps, pose."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # An exit, not a death: the pictures lie in memory until somebody removes them.
        signal.signal(number, lambda *_: sys.exit())
    options = json.loads(sys.argv[1])
    rig = VirtualRig(options.pop("pose"))
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="virtual-arm-", dir=in_memory) as folder:
        paths = {name: Path(folder) / f"{number}.frame" for number, name in enumerate(options.pop("cameras"))}
        pictures = _Pictures(rig, paths, **options) if paths else None
        try:
            ready = {"port": rig.port, "cameras": {name: f"sim:{path}" for name, path in paths.items()}}
            print(json.dumps(ready), flush=True)
            rig.run()
        finally:
            if pictures is not None:
                pictures.close()


if __name__ == "__main__":
    main()
