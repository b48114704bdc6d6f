"""Virtual servos behind one protocol: request bytes in, answer bytes out. No port, no clock of its own."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from . import frames
from .calibration import Calibration
from .errors import BusError
from .frames import Instruction
from .sts3215 import STREAMED, TICKS_PER_TURN, Register
from .virtual_servo import VirtualServo

LOG_LENGTH = 100_000
LONGEST_STEP_S = 0.01
# What a goal may move within the longest step of time (0.1 s) at the default speed limits: 90 deg/s for the
# body joints, 200 %/s of its range for the gripper. Rounding adds a tick.
STEP_S, BODY_TICKS_S, GRIPPER_RANGES_S, ROUNDING_TICKS = 0.1, 90 / 360 * TICKS_PER_TURN, 2.0, 1
NOISE_BYTES = 5


class Goal(NamedTuple):
    """A Goal_Position a servo was sent: raw ticks, and the monotonic time it came."""

    time_s: float
    id: int
    raw: int


class Write(NamedTuple):
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
        self.frames_seen = self.eprom_writes = 0
        self.violations: deque[str] = deque(maxlen=LOG_LENGTH)
        self.goals: deque[Goal] = deque(maxlen=LOG_LENGTH)
        self.writes: deque[Write] = deque(maxlen=LOG_LENGTH)
        self.echo = False
        self._faults: dict[tuple[str, int], tuple[int, float]] = {}  # (kind, id) -> count left, value
        self._random = random.Random(0)
        self._parser = frames.instruction_parser()
        self._outbox: list[tuple[float, int, bytes]] = []
        self._answers = 0
        self._free_s = dict.fromkeys(self.servos, 0.0)
        self._now_s = now_s

    def inject(self, kind: str, servo_id: int = 1, count: int = 1, value: float = 0.0) -> None:
        """Something wrong with a servo, for its next `count` answers or writes (-1: for good, 0: no more).

        Answers: "mute" none, "corrupt" wrong checksum, "delay" `value` seconds late, "truncate" cut after `value`
        bytes, "trickle" `value` seconds between bytes, "noise" `value` bytes (0: 5) and FF FF FF before it,
        "wrong_id" comes as id `value` (0: its own + 100), "wrong_length" with `value` bytes (0: 1) too many,
        "bad_error" ERROR byte above 0x7F, "duplicate" given twice, as by two servos with one id.
        Writes: "lost_write" acknowledged, but the register at address `value` stays as it was.
        Until told otherwise: "error" has `value` as its ERROR byte, "stuck" is blocked (count 0: free again),
        and "echo" makes the adapter repeat every request.
        """
        servo = self.servos[servo_id]
        if kind == "error":
            servo.error = int(value)
            servo.set_register(Register.STATUS, servo.error)
        elif kind == "stuck":
            servo.stuck = count != 0
        elif kind == "echo":
            self.echo = True
        else:
            self._faults[kind, servo_id] = count, value

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
            try:
                self._handle(frame)
            except (IndexError, ValueError, BusError):
                self.violations.append(f"malformed instruction {frame.code}: {frame.params.hex(' ')}")

    def due(self) -> bytes:
        """Answers that are on the wire by now."""
        data = b""
        while self._outbox and self._outbox[0][0] <= self._now_s:
            data += heapq.heappop(self._outbox)[2]
        return data

    @property
    def next_due_s(self) -> float:
        """When the next answer is due; infinite for none."""
        return self._outbox[0][0] if self._outbox else math.inf

    def _handle(self, frame: frames.Frame) -> None:
        broadcast, params, now_s = frame.id == frames.BROADCAST_ID, frame.params, self._now_s
        addressed = [servo for servo in self.servos.values() if broadcast or servo.id == frame.id]
        if frame.code == Instruction.PING:
            for servo in addressed:
                self._answer(servo, b"", now_s)
        elif frame.code == Instruction.READ:
            address, size = params
            for servo in [] if broadcast else addressed:
                self._answer(servo, servo.read(address, size), now_s)
        elif frame.code == Instruction.WRITE:
            for servo in addressed:
                self._apply(servo, params[0], params[1:])
                if not broadcast and servo.peek(Register.RESPONSE_STATUS_LEVEL):
                    self._answer(servo, b"", now_s)
        elif frame.code == Instruction.SYNC_READ:
            address, size = params[:2]
            for servo in [self.servos[i] for i in params[2:] if i in self.servos]:
                # Each waits for the one before it.
                now_s = self._answer(servo, servo.read(address, size), now_s)
        elif frame.code == Instruction.SYNC_WRITE:
            address, size = params[:2]
            if len(params[2:]) % (size + 1):
                raise ValueError("length")
            for start in range(2, len(params), size + 1):
                if params[start] in self.servos:
                    data = params[start + 1 : start + 1 + size]
                    self._apply(self.servos[params[start]], address, data, unlogged=STREAMED)
        else:
            self.violations.append(f"instruction {frame.code} to id {frame.id}")

    def _apply(self, servo: VirtualServo, address: int, data: bytes, unlogged: Sequence[Register] = ()) -> None:
        touched = servo.touched(address, data)
        _, lost_at = self._faults.get(("lost_write", servo.id), (0, -1))
        lost = {r for r in touched if r.address == lost_at and self._strikes("lost_write", servo.id)}
        self.violations += servo.objections(address, data)
        servo.write(address, data, lost)
        self.eprom_writes += sum(register.area == "EPROM" for register in touched)
        self.writes += [Write(self._now_s, servo.id, r, v) for r, v in touched.items() if r not in unlogged]
        if Register.GOAL_POSITION in touched:
            self.goals.append(Goal(self._now_s, servo.id, touched[Register.GOAL_POSITION]))

    def _strikes(self, kind: str, servo_id: int) -> bool:
        """Whether this fault strikes now; that uses up one of its count."""
        left, value = self._faults[kind, servo_id]
        self._faults[kind, servo_id] = left - (left > 0), value
        return left != 0

    def _answer(self, servo: VirtualServo, params: bytes, start_s: float) -> float:
        """Queue one answer, spoiled by the faults; returns when it is out."""
        faults = {
            kind: value
            for (kind, servo_id), (_, value) in [*self._faults.items()]
            if servo_id == servo.id and kind != "lost_write" and self._strikes(kind, servo_id)
        }
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
