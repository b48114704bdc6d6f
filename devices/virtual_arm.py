"""A virtual SO-101 in a process of its own: a serial port, camera pictures and a record of what it was told.

Try it: `python -m smolvla_edge.devices.virtual_arm` prints its port and calibration and runs until its
standard input ends. It runs apart: inside the process under test it would answer only when that one sleeps.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tty
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .calibration import Calibration, JointCalibration
from .errors import DeviceError
from .shared_frame import SharedFrameWriter
from .sts3215 import Register
from .virtual_bus import Fault, VirtualBus

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
    open_camera}. Names with a viewpoint of their own: front, wrist, top, side. DeviceError when it does
    not start.
    """

    def __init__(
        self,
        cameras: Sequence[str] = ("front", "wrist"),
        width: int = 640,
        height: int = 480,
        fps: float = 15.0,
    ) -> None:
        if not (width > 0 and height > 0 and 0 < fps <= 30):
            raise DeviceError(f"cannot draw {width} x {height} at {fps} fps: expected a size, and 30 fps at most.")
        self.calibration = VIRTUAL_CALIBRATION
        self._folder = tempfile.mkdtemp(prefix="virtual-arm-", dir=_memory_folder())
        options = {
            "cameras": list(cameras),
            "width": width,
            "height": height,
            "fps": fps,
            "folder": self._folder,
        }
        # A session of its own: Ctrl-C must reach the driver, not the arm it drives.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smolvla_edge.devices.virtual_arm", json.dumps(options)],
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
        """Every register of one servo, now."""
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

    def inject(self, kind: str, servo_id: int = 1, count: int = 1, value: float = 0.0) -> None:
        """Make answers fail: see Fault, and VirtualBus.inject for the kinds "error" and "echo"."""
        self._ask("inject", kind=kind, id=servo_id, count=count, value=value)

    def set_register(self, servo_id: int, register: Register, value: int) -> None:
        """Set any register; Present_Position moves the servo."""
        self._ask("set_register", id=servo_id, register=register.name, value=value)

    def reboot(self, servo_id: int) -> None:
        """Cut the power of one servo for a moment."""
        self._ask("reboot", id=servo_id)

    def reset(self) -> None:
        """New servos, no faults, empty logs; port and cameras stay."""
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

    def __init__(self) -> None:
        self.bus = VirtualBus(VIRTUAL_CALIBRATION, time.monotonic())
        self._master, self._slave = os.openpty()
        # Raw on both ends before anybody opens it, or 0x0D and its like are rewritten on the way. The slave
        # end stays open here, or the master end fails between two clients.
        tty.setraw(self._master)
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.port = os.ttyname(self._slave)
        self._control = b""

    def run(self) -> None:
        """Until standard input ends: the starter has closed it, or has died."""
        wait_s = MOTION_PERIOD_S
        while True:
            readable, _, _ = select.select([self._master, 0], [], [], wait_s)
            self.bus.advance(time.monotonic())
            if self._master in readable:
                self.bus.receive(os.read(self._master, 4096))
            if 0 in readable and not self._answer_control():
                return
            # Blocked when nobody reads the port: a real line would lose these bytes too.
            with suppress(BlockingIOError):
                os.write(self._master, self.bus.due())
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
        if op == "registers":
            return bus.servos[arguments["id"]].registers()
        if op == "violations":
            return list(bus.violations)
        if op == "frames_seen":
            return bus.frames_seen
        if op == "goals":
            return list(bus.goals)
        if op == "inject":
            return bus.inject(Fault(**arguments))
        if op == "set_register":
            return bus.servos[arguments["id"]].poke(Register[arguments["register"]], arguments["value"])
        if op == "reboot":
            return bus.servos[arguments["id"]].reboot()
        if op == "reset":
            return bus.reset(time.monotonic())
        raise ValueError(f"unknown operation {op!r}")


class _Pictures:
    """Inside the process: draws every camera into its file."""

    def __init__(self, bus: VirtualBus, paths: dict[str, Path], width: int, height: int) -> None:
        from .virtual_view import VirtualView  # needs OpenCV, which an arm without cameras does not

        self._bus = bus
        self._cameras = [
            (VirtualView(name, VIRTUAL_CALIBRATION, width, height), SharedFrameWriter(path, width, height))
            for name, path in paths.items()
        ]

    def draw(self) -> None:
        for view, writer in self._cameras:
            time_s = time.monotonic()
            writer.write(view.render([servo.position for servo in self._bus.servos.values()]), time_s)

    def run(self, fps: float) -> None:
        """Thread: draw for as long as the process lives."""
        due_s = time.monotonic()
        while True:
            self.draw()
            due_s = max(due_s + 1 / fps, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))


def main() -> None:
    """Run the process. The one optional argument is a JSON object: cameras, width, height, fps, folder."""
    options: dict[str, Any] = {"cameras": [], "width": 640, "height": 480, "fps": 15.0, "folder": None}
    if len(sys.argv) > 1:
        options |= json.loads(sys.argv[1])
    process = _Process()
    folder = Path(options["folder"] or tempfile.mkdtemp(prefix="virtual-arm-", dir=_memory_folder()))
    try:
        paths = {name: folder / f"{number}.frame" for number, name in enumerate(options["cameras"])}
        if paths:
            pictures = _Pictures(process.bus, paths, options["width"], options["height"])
            # The first drawing is slow; once ready, the arm must answer without a pause.
            pictures.draw()
            threading.Thread(target=pictures.run, args=(options["fps"],), daemon=True).start()
        sources = {name: f"sim:{path}" for name, path in paths.items()}
        ready = {"port": process.port, "cameras": sources, "calibration": VIRTUAL_CALIBRATION.to_dict()}
        print(json.dumps(ready), flush=True)
        process.run()
    except KeyboardInterrupt:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
