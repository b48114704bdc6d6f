"""Virtual servos behind one protocol: request bytes in, answer bytes out. No port, no clock of its own."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import frames
from .calibration import Calibration
from .errors import ArmError, BusError
from .frames import Instruction
from .sts3215 import TICKS_PER_TURN, Register
from .virtual_servo import VirtualServo

LOG_LENGTH = 100_000
LONGEST_STEP_S = 0.01
# What a goal may move within the longest step of time (0.1 s) at the default speed limits: 90 deg/s for the
# body joints, 200 %/s of its range for the gripper. Rounding adds a tick.
STEP_S, BODY_TICKS_S, GRIPPER_RANGES_S, ROUNDING_TICKS = 0.1, 90 / 360 * TICKS_PER_TURN, 2.0, 1
NOISE_BYTES = 5
# A sync write of these is the traffic of every control tick and would bury the other writes.
STREAMED = (Register.ACCELERATION, Register.GOAL_POSITION, Register.GOAL_TIME, Register.GOAL_VELOCITY)
ANSWER_FAULTS = (
    *("mute", "corrupt", "delay", "truncate", "trickle", "noise"),
    *("wrong_id", "wrong_length", "bad_error", "duplicate"),
)


@dataclass
class Fault:
    """Something wrong with servo `id`, for its next `count` answers or writes (-1: for good, 0: no more).

    Answers: "mute" none, "corrupt" wrong checksum, "delay" `value` seconds late, "truncate" cut after `value`
    bytes, "trickle" `value` seconds between bytes, "noise" `value` bytes (0: 5) and FF FF FF before it,
    "wrong_id" comes as id `value` (0: its own + 100), "wrong_length" with `value` bytes (0: 1) too many,
    "bad_error" ERROR byte above 0x7F, "duplicate" given twice, as by two servos with one id.
    Writes: "lost_write" acknowledged, but the register at address `value` stays as it was.
    Until told otherwise: "error" has `value` as its ERROR byte, "stuck" is blocked (count 0: free again),
    and "echo" makes the adapter repeat every request.
    """

    kind: str
    id: int
    count: int = 1
    value: float = 0.0


@dataclass(frozen=True)
class Write:
    """A register write that a servo was sent: value with its sign, and the monotonic time it came."""

    time_s: float
    id: int
    register: Register
    value: int


class VirtualBus:
    """The servos of an arm with this calibration. Time is whatever the caller passes as `now_s`.

    pose: where they start, [6] raw ticks; the middle of each range unless given.
    """

    def __init__(self, calibration: Calibration, now_s: float, pose: Sequence[int] | None = None) -> None:
        self._calibration = calibration
        self._pose = pose or [(joint.range_min + joint.range_max) // 2 for joint in calibration.joints]
        self.reset(now_s)

    def reset(self, now_s: float) -> None:
        """New servos, no faults, empty logs."""
        gripper = self._calibration.joints[-1]
        gripper_ticks_s = GRIPPER_RANGES_S * (gripper.range_max - gripper.range_min)
        self.servos = {
            joint.id: VirtualServo(joint.id, joint, pose)
            for joint, pose in zip(self._calibration.joints, self._pose, strict=True)
        }
        self.expect_steps([STEP_S * BODY_TICKS_S] * (len(self.servos) - 1) + [STEP_S * gripper_ticks_s])
        self.frames_seen = 0
        self.eprom_writes = 0
        self.violations: deque[str] = deque(maxlen=LOG_LENGTH)
        self.goals: deque[tuple[float, int, int]] = deque(maxlen=LOG_LENGTH)
        self.writes: deque[Write] = deque(maxlen=LOG_LENGTH)
        self.echo = False
        self._faults: list[Fault] = []
        self._random = random.Random(0)
        self._parser = frames.instruction_parser()
        self._outbox: list[tuple[float, int, bytes]] = []
        self._answers = 0
        self._free_s = dict.fromkeys(self.servos, 0.0)
        self._now_s = now_s

    def inject(self, fault: Fault) -> None:
        """Add a fault, see Fault. ArmError for an unknown kind."""
        servo = self.servos[fault.id]
        if fault.kind == "error":
            servo.error = int(fault.value)
            servo.poke(Register.STATUS, servo.error)
        elif fault.kind == "stuck":
            servo.stuck = fault.count != 0
        elif fault.kind == "echo":
            self.echo = True
        elif fault.kind in ANSWER_FAULTS or fault.kind == "lost_write":
            if fault.count:
                self._faults.insert(0, fault)
            else:
                self._faults = [f for f in self._faults if (f.kind, f.id) != (fault.kind, fault.id)]
        else:
            known = ", ".join(ANSWER_FAULTS)
            raise ArmError(f"unknown fault {fault.kind!r}, expected {known}, lost_write, error, stuck or echo.")

    def expect_steps(self, ticks: Sequence[float]) -> None:
        """Bound the step between consecutive goals of each servo, [6] ticks; rounding may add one."""
        for servo, bound in zip(self.servos.values(), ticks, strict=True):
            servo.max_step = bound + ROUNDING_TICKS

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
        except (IndexError, ValueError, BusError):
            self.violations.append(f"malformed instruction {frame.code}: {frame.params.hex(' ')}")

    def _addressed(self, frame: frames.Frame) -> list[VirtualServo]:
        if frame.id == frames.BROADCAST_ID:
            return list(self.servos.values())
        return [self.servos[frame.id]] if frame.id in self.servos else []

    def _ping(self, frame: frames.Frame) -> None:
        for servo in self._addressed(frame):
            self._answer(servo, b"", self._now_s)

    def _read(self, frame: frames.Frame) -> None:
        address, size = frame.params
        # A broadcast read is not answered.
        if frame.id in self.servos:
            servo = self.servos[frame.id]
            self._answer(servo, servo.read(address, size), self._now_s)

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
        start_s = self._now_s
        for servo_id in frame.params[2:]:
            # Each waits for the one before it.
            if servo_id in self.servos:
                servo = self.servos[servo_id]
                start_s = self._answer(servo, servo.read(address, size), start_s)

    def _sync_write(self, frame: frames.Frame) -> None:
        address, size = frame.params[:2]
        entries = frame.params[2:]
        if len(entries) % (size + 1):
            raise ValueError("length")
        for start in range(0, len(entries), size + 1):
            if entries[start] in self.servos:
                data = entries[start + 1 : start + 1 + size]
                self._apply(self.servos[entries[start]], address, data, unlogged=STREAMED)

    def _apply(self, servo: VirtualServo, address: int, data: bytes, unlogged: Sequence[Register] = ()) -> None:
        touched = servo.touched(address, data)
        lost = {r for r in touched if self._active(servo, "lost_write", r.address)}
        self.violations += servo.objections(address, data)
        servo.write(address, data, lost)
        self.eprom_writes += sum(register.area != "SRAM" for register in touched)
        self.writes += [Write(self._now_s, servo.id, r, v) for r, v in touched.items() if r not in unlogged]
        if Register.GOAL_POSITION in touched:
            self.goals.append((self._now_s, servo.id, touched[Register.GOAL_POSITION]))

    def _acknowledge(self, servo: VirtualServo, frame: frames.Frame) -> None:
        if frame.id != frames.BROADCAST_ID and servo.peek(Register.RESPONSE_STATUS_LEVEL):
            self._answer(servo, b"", self._now_s)

    def _active(self, servo: VirtualServo, kind: str, value: float | None = None) -> Fault | None:
        """The fault of this kind that strikes now; that uses up one of its count."""
        for fault in self._faults:
            if (fault.kind, fault.id) == (kind, servo.id) and fault.count and value in (None, fault.value):
                fault.count -= fault.count > 0
                return fault
        return None

    def _answer(self, servo: VirtualServo, params: bytes, start_s: float) -> float:
        """Queue one answer, spoiled by the faults; returns when it is out."""
        faults = {kind: fault.value for kind in ANSWER_FAULTS if (fault := self._active(servo, kind))}
        if "mute" in faults:
            return start_s
        servo_id = int(faults.get("wrong_id", servo.id)) or servo.id + 100
        if "wrong_length" in faults:
            params += bytes(int(faults["wrong_length"]) or 1)
        data = frames.build(servo_id, servo.error | (0x80 if "bad_error" in faults else 0), params)
        if "corrupt" in faults:
            data = data[:-1] + bytes((data[-1] ^ 0xFF,))
        if "duplicate" in faults:
            data += data
        if "truncate" in faults:
            data = data[: int(faults["truncate"])]
        if "noise" in faults:
            data = self._random.randbytes(int(faults["noise"]) or NOISE_BYTES) + b"\xff\xff\xff" + data
        # One servo answers in order: what follows a late answer is at least as late.
        due_s = max(start_s + faults.get("delay", 0.0), self._free_s[servo.id])
        if "trickle" in faults:
            for byte in data:
                self._queue(bytes((byte,)), due_s)
                due_s += faults["trickle"]
        else:
            self._queue(data, due_s)
        self._free_s[servo.id] = due_s
        return due_s

    def _queue(self, data: bytes, due_s: float) -> None:
        self._answers += 1
        heapq.heappush(self._outbox, (due_s, self._answers, data))
