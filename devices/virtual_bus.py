"""Virtual servos behind one protocol: request bytes in, answer bytes out. No port, no clock of its own."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from . import frames
from .calibration import Calibration
from .errors import ArmError
from .frames import Instruction
from .sts3215 import Register
from .virtual_servo import VirtualServo

LOG_LENGTH = 100_000
LONGEST_STEP_S = 0.01


@dataclass
class Fault:
    """Spoils the next `count` answers of servo `id` (-1: all of them from now on).

    kind: "mute" (no answer), "corrupt" (wrong checksum) or "delay" (`value` seconds late).
    """

    kind: str
    id: int
    count: int = 1
    value: float = 0.0


class VirtualBus:
    """The servos of an arm with this calibration. Time is whatever the caller passes as `now_s`."""

    def __init__(self, calibration: Calibration, now_s: float) -> None:
        self._calibration = calibration
        self.reset(now_s)

    def reset(self, now_s: float) -> None:
        """New servos, no faults, empty logs."""
        self.servos = {joint.id: VirtualServo(joint.id, joint) for joint in self._calibration.joints}
        self.frames_seen = 0
        self.violations: deque[str] = deque(maxlen=LOG_LENGTH)
        self.goals: deque[tuple[float, int, int]] = deque(maxlen=LOG_LENGTH)
        self.echo = False
        self._faults: list[Fault] = []
        self._parser = frames.instruction_parser()
        self._outbox: list[tuple[float, int, bytes]] = []
        self._answers = 0
        self._free_s = dict.fromkeys(self.servos, 0.0)
        self._now_s = now_s

    def inject(self, fault: Fault) -> None:
        """Add a fault. Two further kinds last until `reset`.

        "error" makes `value` the servo's ERROR byte; "echo" repeats every request, as some adapters do.
        """
        if fault.kind == "error":
            self.servos[fault.id].error = int(fault.value)
        elif fault.kind == "echo":
            self.echo = True
        elif fault.kind in ("mute", "corrupt", "delay"):
            self._faults.append(fault)
        else:
            raise ArmError(f"unknown fault {fault.kind!r}, expected mute, corrupt, delay, error or echo.")

    def advance(self, now_s: float) -> None:
        """Let the servos move up to `now_s`."""
        left = now_s - self._now_s
        self._now_s = now_s
        while left > 0:
            step = min(left, LONGEST_STEP_S)
            left -= step
            for servo in self.servos.values():
                servo.advance(step)

    def receive(self, data: bytes) -> None:
        """Take bytes from the host."""
        if self.echo:
            self._queue(data, self._now_s)
        for frame in self._parser.feed(data):
            self.frames_seen += 1
            self._handle(frame)

    def due(self) -> bytes:
        """Answers that are on the wire by now."""
        data = b""
        while self._outbox and self._outbox[0][0] <= self._now_s:
            data += heapq.heappop(self._outbox)[2]
        return data

    @property
    def next_due_s(self) -> float | None:
        """When the next answer is due, or None."""
        return self._outbox[0][0] if self._outbox else None

    def _handle(self, frame: frames.Frame) -> None:
        handlers: dict[int, Callable[[frames.Frame], None]] = {
            Instruction.PING: self._ping,
            Instruction.READ: self._read,
            Instruction.WRITE: self._write,
            Instruction.REG_WRITE: self._write,
            Instruction.ACTION: self._action,
            Instruction.SYNC_READ: self._sync_read,
            Instruction.SYNC_WRITE: self._sync_write,
        }
        handler = handlers.get(frame.code)
        if handler is None:
            self.violations.append(f"instruction {frame.code} to id {frame.id}")
            return
        try:
            handler(frame)
        except (IndexError, ValueError):
            self.violations.append(f"malformed instruction {frame.code}: {frame.params.hex(' ')}")

    def _addressed(self, frame: frames.Frame) -> list[VirtualServo]:
        if frame.id == frames.BROADCAST_ID:
            return list(self.servos.values())
        return [self.servos[frame.id]] if frame.id in self.servos else []

    def _ping(self, frame: frames.Frame) -> None:
        for servo in self._addressed(frame):
            self._answer(servo, b"")

    def _read(self, frame: frames.Frame) -> None:
        address, size = frame.params
        # A broadcast read is not answered.
        if frame.id in self.servos:
            self._answer(self.servos[frame.id], self.servos[frame.id].read(address, size))

    def _write(self, frame: frames.Frame) -> None:
        address, data = frame.params[0], frame.params[1:]
        for servo in self._addressed(frame):
            if frame.code == Instruction.REG_WRITE:
                servo.prepare(address, data)
            else:
                self._apply(servo, address, data)
            self._acknowledge(servo, frame)

    def _action(self, frame: frames.Frame) -> None:
        for servo in self._addressed(frame):
            kept = servo.act()
            if kept:
                self._apply(servo, *kept)
            self._acknowledge(servo, frame)

    def _sync_read(self, frame: frames.Frame) -> None:
        address, size = frame.params[:2]
        for servo_id in frame.params[2:]:
            if servo_id in self.servos:
                self._answer(self.servos[servo_id], self.servos[servo_id].read(address, size))

    def _sync_write(self, frame: frames.Frame) -> None:
        address, size = frame.params[:2]
        entries = frame.params[2:]
        if len(entries) % (size + 1):
            raise ValueError("length")
        for start in range(0, len(entries), size + 1):
            if entries[start] in self.servos:
                self._apply(self.servos[entries[start]], address, entries[start + 1 : start + 1 + size])

    def _apply(self, servo: VirtualServo, address: int, data: bytes) -> None:
        self.violations += servo.objections(address, data)
        servo.write(address, data)
        goal = Register.GOAL_POSITION
        if address < goal.end and goal.address < address + len(data):
            self.goals.append((self._now_s, servo.id, servo.peek(goal)))

    def _acknowledge(self, servo: VirtualServo, frame: frames.Frame) -> None:
        if frame.id != frames.BROADCAST_ID and servo.peek(Register.RESPONSE_STATUS_LEVEL):
            self._answer(servo, b"")

    def _answer(self, servo: VirtualServo, params: bytes) -> None:
        data = frames.build(servo.id, servo.error, params)
        due_s = self._now_s
        for fault in [f for f in self._faults if f.id == servo.id and f.count]:
            fault.count -= fault.count > 0
            if fault.kind == "mute":
                return
            if fault.kind == "corrupt":
                data = data[:-1] + bytes((data[-1] ^ 0xFF,))
            if fault.kind == "delay":
                due_s += fault.value
        # One servo answers in order: what follows a late answer is at least as late.
        self._free_s[servo.id] = due_s = max(due_s, self._free_s[servo.id])
        self._queue(data, due_s)

    def _queue(self, data: bytes, due_s: float) -> None:
        self._answers += 1
        heapq.heappush(self._outbox, (due_s, self._answers, data))
