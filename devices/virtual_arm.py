"""A virtual SO-101 in a process of its own: a serial port, camera pictures and a record of what it was told.

`python -m smolvla_edge.devices.virtual_arm` prints one line of JSON (port, camera sources, calibration) and
runs until its standard input ends. It is a process of its own because inside the one that drives it, it would
answer only when that one sleeps.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tty
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .calibration import Calibration, JointCalibration
from .errors import DeviceError
from .shared_frame import SharedFrameWriter
from .sts3215 import Register
from .virtual_bus import Fault, VirtualBus, Write

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


@dataclass(frozen=True)
class Goal:
    """A Goal_Position a servo was sent: raw ticks, and the monotonic time it came."""

    time_s: float
    id: int
    raw: int


class VirtualArm:
    """Starts the process and waits until it is ready; `close` (or leaving the context) ends it.

    port: path of its serial port. calibration: what its servos hold. camera_sources: {name: source for
    open_camera}. Names with a viewpoint of their own: front, wrist, top, side. pose: where the servos start,
    [6] raw ticks; the middle of each range unless given. DeviceError when it does not start.
    """

    def __init__(
        self,
        cameras: Sequence[str] = ("front", "wrist"),
        width: int = 640,
        height: int = 480,
        fps: float = 15.0,
        pose: Sequence[int] | None = None,
    ) -> None:
        if problem := _problem(width, height, fps, pose):
            raise DeviceError(problem)
        self.calibration = VIRTUAL_CALIBRATION
        self._folder = tempfile.mkdtemp(prefix="virtual-arm-", dir=_memory_folder())
        line = [f"--camera={name}" for name in cameras]
        line += [f"--width={width}", f"--height={height}", f"--fps={fps}", f"--folder={self._folder}"]
        line += ["--pose", *map(str, pose)] if pose is not None else []
        # A session of its own: Ctrl-C must reach the driver, not the arm it drives.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smolvla_edge.devices.virtual_arm", *line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            ready = self._line(START_LIMIT_S)
        except BaseException:
            self.close()
            raise
        self.port: str = ready["port"]
        self.camera_sources: dict[str, str] = ready["cameras"]

    def __enter__(self) -> VirtualArm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the arm."""
        return self._process.pid

    def close(self) -> None:
        """End the process and remove its pictures. May be called again."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def registers(self, servo_id: int) -> dict[Register, int]:
        """Every register of one servo as it is now, nothing forced."""
        values = self._ask("registers", id=servo_id)
        return {register: values[register.name] for register in Register}

    def violations(self) -> list[str]:
        """What a careful host would not have sent, oldest first."""
        return list(self._ask("violations"))

    def frames_seen(self) -> int:
        """How many valid instruction frames have come in."""
        return int(self._ask("frames_seen"))

    def goals(self) -> list[Goal]:
        """Every goal that has come in, oldest first."""
        return [Goal(*entry) for entry in self._ask("goals")]

    def writes(self) -> list[Write]:
        """Every register write that has come in, oldest first; of sync writes only other registers than 41 to 47.

        A broadcast counts once for each servo.
        """
        return [Write(time_s, servo, Register[name], value) for time_s, servo, name, value in self._ask("writes")]

    def eprom_writes(self) -> int:
        """How many writes to registers of EPROM and factory area have come in, those that changed nothing too."""
        return int(self._ask("eprom_writes"))

    def expect_steps(self, ticks: Sequence[float]) -> None:
        """From now on a step between consecutive goals above `ticks`, [6], is a violation."""
        self._ask("expect_steps", ticks=list(map(float, ticks)))

    def inject(self, kind: str, servo_id: int = 1, count: int = 1, value: float = 0.0) -> None:
        """Make a servo fail, see Fault for the kinds."""
        self._ask("inject", kind=kind, id=servo_id, count=count, value=value)

    def force(self, servo_id: int, register: Register, value: int | None) -> None:
        """What the bus reads of a register, whatever is true (None: the truth again). Nothing moves."""
        self._ask("force", id=servo_id, register=register.name, value=value)

    def hang_up(self) -> None:
        """Unplug the adapter, for good: the port is gone, the servos go on."""
        self._ask("hang_up")

    def deaf(self, on: bool) -> None:
        """Stop reading the port, so that its buffer fills; False: read on."""
        self._ask("deaf", on=on)

    def camera(self, name: str, mode: str, value: float = 0.0) -> None:
        """How a camera behaves: "live", "stall" (no new pictures), "freeze" (the same one again and again),
        "slow" (`value` fps), "swap:NAME" (shows what camera NAME shows).
        """
        self._ask("camera", name=name, mode=mode, value=value)

    def set_register(self, servo_id: int, register: Register, value: int) -> None:
        """Set any register; Present_Position moves the servo, modulo a turn with single-turn feedback."""
        self._ask("poke", id=servo_id, register=register.name, value=value)

    def reboot(self, servo_id: int) -> None:
        """Cut the power of one servo for a moment."""
        self._ask("reboot", id=servo_id)

    def reset(self) -> None:
        """New servos, no faults, live cameras, empty logs, nothing waiting in the port, which stays."""
        self._ask("reset")

    def _ask(self, op: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise DeviceError(f"the virtual arm has ended: {error}. Start another.") from error
        answer = self._line(ANSWER_LIMIT_S)
        if "error" in answer:
            raise DeviceError(f"the virtual arm refused {op}: {answer['error']}")
        return answer["result"]

    def _line(self, limit_s: float) -> dict[str, Any]:
        output = self._process.stdout
        assert output is not None
        line = output.readline() if select.select([output], [], [], limit_s)[0] else b""
        if not line:
            state = self._process.poll()
            raise DeviceError(f"the virtual arm said nothing for {limit_s} s (exit status {state}).")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _memory_folder() -> str | None:
    """Where files stay in memory, if there is such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class _Process:
    """Inside the process: pumps bytes between pseudo-terminal and bus, and answers the control lines."""

    def __init__(self, pose: Sequence[int] | None) -> None:
        self.bus = VirtualBus(VIRTUAL_CALIBRATION, time.monotonic(), pose)
        self.pictures: _Pictures | None = None
        self._master, self._slave = os.openpty()
        # Raw on both ends before anybody opens it, or 0x0D and its like are rewritten on the way. The slave
        # end stays open here, or the master end fails between two clients.
        tty.setraw(self._master)
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.port = os.ttyname(self._slave)
        self._plugged, self._deaf = True, False
        self._control = b""

    def run(self) -> None:
        """Until standard input ends: the starter has closed it, or has died."""
        wait_s = MOTION_PERIOD_S
        while True:
            heard = [self._master] if self._plugged and not self._deaf else []
            readable, _, _ = select.select([*heard, 0], [], [], wait_s)
            self.bus.advance(time.monotonic())
            if self._master in readable:
                self.bus.receive(os.read(self._master, 4096))
            if 0 in readable and not self._answer_control():
                return
            answers = self.bus.due()
            # Blocked when nobody reads the port: a real line would lose these bytes too.
            with suppress(BlockingIOError):
                if self._plugged:
                    os.write(self._master, answers)
            due_s = self.bus.next_due_s
            wait_s = MOTION_PERIOD_S
            if due_s is not None:
                wait_s = min(wait_s, max(0.0, due_s - time.monotonic()))

    def _answer_control(self) -> bool:
        data = os.read(0, 65536)
        *lines, self._control = (self._control + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            try:
                answer = {"result": self._control_result(request.pop("op"), **request)}
            except (DeviceError, KeyError, ValueError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
        return bool(data)

    def _control_result(self, op: str, **arguments: Any) -> Any:
        bus = self.bus
        if op in ("registers", "poke", "force", "reboot"):
            servo = bus.servos[arguments.pop("id")]
            if "register" in arguments:
                arguments["register"] = Register[arguments["register"]]
            return getattr(servo, op)(**arguments)
        operations: dict[str, Callable[..., Any]] = {
            "violations": lambda: list(bus.violations),
            "frames_seen": lambda: bus.frames_seen,
            "goals": lambda: list(bus.goals),
            "writes": lambda: [(w.time_s, w.id, w.register.name, w.value) for w in bus.writes],
            "eprom_writes": lambda: bus.eprom_writes,
            "expect_steps": bus.expect_steps,
            "inject": lambda **fault: bus.inject(Fault(**fault)),
            "camera": self._set_camera,
            "hang_up": self._hang_up,
            "deaf": self._set_deaf,
            "reset": self._reset,
        }
        return operations[op](**arguments)

    def _set_camera(self, name: str, mode: str, value: float) -> None:
        if self.pictures is None:
            raise DeviceError(f"no camera {name!r}: this arm has none.")
        self.pictures.set_mode(name, mode, value)

    def _set_deaf(self, on: bool) -> None:
        self._deaf = on

    def _hang_up(self) -> None:
        if self._plugged:
            self._plugged = False
            os.close(self._slave)
            os.close(self._master)

    def _reset(self) -> None:
        self._deaf = False
        with suppress(BlockingIOError):
            while self._plugged:
                os.read(self._master, 65536)
        self.bus.reset(time.monotonic())
        if self.pictures is not None:
            self.pictures.reset()


class _Pictures:
    """Inside the process: a thread that draws every camera into its file."""

    def __init__(self, bus: VirtualBus, paths: dict[str, Path], width: int, height: int, fps: float) -> None:
        from .virtual_view import VirtualView  # needs OpenCV, which an arm without cameras does not

        self._bus = bus
        self._fps = fps
        self._views = {name: VirtualView(name, VIRTUAL_CALIBRATION, width, height) for name in paths}
        self._writers = {name: SharedFrameWriter(path, width, height) for name, path in paths.items()}
        self._images: dict[str, Any] = {}
        self._due_s = dict.fromkeys(paths, 0.0)
        self.reset()
        # The first drawing is slow; once ready, the arm must answer without a pause.
        self._draw()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """End the drawing: a thread inside OpenCV when Python ends would abort the process."""
        self._stopping.set()
        self._thread.join()

    def reset(self) -> None:
        """Every camera live."""
        self._modes: dict[str, tuple[str, float]] = dict.fromkeys(self._views, ("live", 0.0))

    def set_mode(self, name: str, mode: str, value: float) -> None:
        """See VirtualArm.camera."""
        known = ["live", "stall", "freeze", "slow", *(f"swap:{other}" for other in self._views)]
        if name not in self._views or mode not in known or (mode == "slow" and not value > 0):
            raise DeviceError(
                f"camera {name!r} cannot do {mode!r} with {value}: expected one of {', '.join(self._views)}, "
                f"and of {', '.join(known)} (slow with a rate above 0)."
            )
        self._modes[name] = (mode, value)

    def _draw(self) -> None:
        """One round: a new picture wherever one is due."""
        raw = [servo.position for servo in self._bus.servos.values()]
        for name, (mode, value) in self._modes.copy().items():
            time_s = time.monotonic()
            if mode == "stall" or (mode == "slow" and time_s < self._due_s[name]):
                continue
            if mode != "freeze":
                view = mode.removeprefix("swap:") if mode.startswith("swap:") else name
                self._images[name] = self._views[view].render(raw)
            self._writers[name].write(self._images[name], time_s)
            # The nearest round that there is.
            self._due_s[name] = time_s + (1 / value - 0.5 / self._fps if mode == "slow" else 0.0)

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            self._draw()
            due_s = max(due_s + 1 / self._fps, time.monotonic())


def _problem(width: int, height: int, fps: float, pose: Sequence[int] | None) -> str:
    """Why no arm like this can be started, or ""."""
    if not (width > 0 and height > 0 and 0 < fps <= 30):
        return f"cannot draw {width} x {height} at {fps} fps: expected a size, and 30 fps at most."
    if pose is not None and not (len(pose) == len(VIRTUAL_CALIBRATION.joints) and all(0 <= p <= 4095 for p in pose)):
        return f"cannot start at pose {list(pose)}: expected 6 raw positions, 0 to 4095."
    return ""


def main() -> None:
    """Run the process; see --help."""
    about = "A virtual SO-101: prints its port, camera sources and calibration, runs until standard input ends."
    parser = argparse.ArgumentParser(
        prog="python -m smolvla_edge.devices.virtual_arm",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--camera", action="append", default=[], help="name of a camera to draw; may be repeated")
    parser.add_argument("--width", type=int, default=640, help="of the pictures, pixels")
    parser.add_argument("--height", type=int, default=480, help="of the pictures, pixels")
    parser.add_argument("--fps", type=float, default=15.0, help="pictures per second, 30 at most")
    parser.add_argument("--pose", type=int, nargs=6, help="where the servos start, raw ticks; else mid-range")
    parser.add_argument("--folder", type=Path, help="where the pictures go, removed at the end; else a new one")
    options = parser.parse_args()
    if problem := _problem(options.width, options.height, options.fps, options.pose):
        parser.error(problem)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # An exit, not a death: the pictures lie in memory until somebody removes them.
        signal.signal(number, lambda *_: sys.exit())
    process = _Process(options.pose)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="virtual-arm-", dir=_memory_folder()))
    try:
        paths = {name: folder / f"{number}.frame" for number, name in enumerate(options.camera)}
        if paths:
            process.pictures = _Pictures(process.bus, paths, options.width, options.height, options.fps)
        sources = {name: f"sim:{path}" for name, path in paths.items()}
        ready = {"port": process.port, "cameras": sources, "calibration": VIRTUAL_CALIBRATION.to_dict()}
        print(json.dumps(ready), flush=True)
        process.run()
    except KeyboardInterrupt:
        pass
    finally:
        if process.pictures is not None:
            process.pictures.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
