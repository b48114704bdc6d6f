"""The virtual arm as tests need it.

It records what it was told, objects to what a careful host would not send, and fails as it is asked
to.
"""

import heapq
import math
import os
import pickle
import random
import select
import sys
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from smolvla_edge.core.errors import BusError, DeviceError
from smolvla_edge.devices.bus import frames
from smolvla_edge.devices.bus.frames import Instruction
from smolvla_edge.devices.bus.sts3215 import (
    FORBIDDEN_WRITES,
    STREAMED,
    TICKS_PER_TURN,
    Register,
    decode,
    encode,
)
from smolvla_edge.devices.virtual.virtual_arm import (
    MOTION_PERIOD_S,
    PICTURE_PERIOD_S,
    VIRTUAL_CALIBRATION,
    VirtualArm,
    VirtualCamera,
    VirtualHardware,
    serve,
)
from smolvla_edge.devices.virtual.virtual_bus import VirtualBus, VirtualServo, servos_at
from support.paths import TESTS

LOG_LENGTH = 100_000
# The longest way of a goal in the longest step of time (0.1 s) at the default speed limits: 90
# deg/s for the body joints, 200 %/s of its range for the gripper. Rounding adds a tick.
STEP_S, BODY_TICKS_S, GRIPPER_RANGES_S, ROUNDING_TICKS = 0.1, 90 / 360 * TICKS_PER_TURN, 2.0, 1
NOISE_BYTES = 5
# A goal counts as the present position within this many ticks.
SAME_TICKS = 5
# A blocked servo pushes in proportion to the error, fully from 9 degrees on. It draws what its coil
# allows: 3.9 A (600 units of 6.5 mA) at full duty, above the 3.25 A of a default
# Protection_Current.
BLOCKED_LOAD_PER_TICK, BLOCKED_CURRENT_PER_LOAD = 10, 0.6
ANSWER_LIMIT_S = 5.0


class Goal(NamedTuple):
    """A Goal_Position a servo was sent: raw ticks, and the monotonic time it came."""

    time_s: float
    id: int
    raw: int


class Write(NamedTuple):
    """A register write that a servo was sent: value with its sign, and its monotonic time."""

    time_s: float
    id: int
    register: Register
    value: int


class FaultyServo(VirtualServo):
    """error: its ERROR byte. stuck: it is blocked.

    max_step: the largest step between two goals while it is on, in ticks.
    """

    def __init__(self, joint, pose):
        self.max_step, self.stuck, self.error = math.inf, False, 0
        self._forced = {}
        self._last_goal = 0  # the one that was sent, even if it was lost
        super().__init__(joint, pose)
        self._lasting = bytearray(self._memory)

    def set_register(self, register, value):
        super().set_register(register, value)
        if register is Register.GOAL_POSITION:
            self._last_goal = value

    def force(self, register, value):
        """What the bus reads of a register from now on; None: its real value again."""
        self._forced.pop(register, None)
        if value is not None:
            self._forced[register] = encode(register, value)

    def registers(self):
        """Every register as it is: nothing forced."""
        return {register: self.peek(register) for register in Register}

    def read(self, address, size):
        shown = bytearray(super().read(0, 256))
        for register, data in self._forced.items():
            shown[register.address : register.end] = data
        return bytes(shown[address : address + size]).ljust(size, b"\0")

    def touched(self, address, data):
        """Every register that a write reaches, with the value it would have then."""
        after = bytearray(self._memory)
        after[address : address + len(data)] = data
        return {
            r: decode(r, bytes(after[r.address : r.end]))
            for r in Register
            if address < r.end and r.address < address + len(data)
        }

    def objections(self, address, data):
        """What a careful host would not have written to this servo now."""
        written = self.touched(address, data)
        found = [] if written else [f"write to no known register at {address}"]
        found += [f"write to {register}" for register in written if register in FORBIDDEN_WRITES]
        found += [f"write to read-only {register}" for register in written if not register.writable]
        energised = self.peek(Register.TORQUE_ENABLE) == 1
        if energised and any(register.area == "EPROM" for register in written):
            found.append(f"EPROM write at {address} while energised")
        torque = written.get(Register.TORQUE_ENABLE)
        if torque is not None and torque not in (0, 1):
            found.append(f"Torque_Enable set to {torque}")
        goal = written.get(Register.GOAL_POSITION, self.peek(Register.GOAL_POSITION))
        off_by = abs(goal - round(self.position))
        if torque == 1 and not energised and off_by > SAME_TICKS:
            found.append(f"torque on with goal {goal} at position {round(self.position)}")
        if Register.GOAL_POSITION in written:
            if self._outside(goal) > self._outside(self.position) + SAME_TICKS:
                found.append(f"goal {goal} beyond the limits")
            # A goal at the present position unloads a servo. It is no jump.
            if energised and abs(goal - self._last_goal) > self.max_step and off_by > SAME_TICKS:
                found.append(
                    f"goal {goal} after {self._last_goal}: a step of more than {self.max_step:.0f}"
                )
        return [f"servo {self.id}: {what}" for what in found]

    def write(self, address, data, lost=()):
        """Write to registers that are writable and not `lost`. EPROM lasts only while Lock is 0."""
        unlocked = self.peek(Register.LOCK) == 0
        written = self.touched(address, data)
        self._last_goal = written.get(Register.GOAL_POSITION, self._last_goal)
        for register, value in written.items():
            if register.writable and register not in lost:
                super().write(register.address, encode(register, value))
                if register.area == "EPROM" and unlocked:
                    place = slice(register.address, register.end)
                    self._lasting[place] = self._memory[place]

    def reboot(self):
        """Power off and on: torque off, volatile registers as at power-up, goal at the position."""
        self._memory[:] = self._lasting
        self._velocity = 0.0
        self._show(0.0, 0.0)
        self.set_register(Register.GOAL_POSITION, self.peek(Register.PRESENT_POSITION))
        self.set_register(Register.TORQUE_LIMIT, self.peek(Register.MAX_TORQUE_LIMIT))

    def advance(self, dt_s):
        if not self.stuck:
            super().advance(dt_s)
            return
        self._velocity = 0.0
        limit = min(1000, self.peek(Register.TORQUE_LIMIT))
        load = min(limit, max(-limit, self._distance() * BLOCKED_LOAD_PER_TICK))
        self._show(load, abs(load) * BLOCKED_CURRENT_PER_LOAD)

    def _show(self, load, current):
        super()._show(load, current)
        self._memory[Register.STATUS.address] = self.error

    def _outside(self, ticks):
        """How far a position lies outside the limits, in ticks."""
        low, high = self.peek(Register.MIN_POSITION_LIMIT), self.peek(Register.MAX_POSITION_LIMIT)
        return max(low - ticks, ticks - high, 0.0)


class FaultyBus(VirtualBus):
    def __init__(self, calibration, now_s, pose=None):
        self._calibration, self._pose = calibration, pose
        self.reset(now_s)

    def reset(self, now_s):
        """New servos, no faults, empty logs."""
        super().__init__(servos_at(self._calibration, self._pose, FaultyServo), now_s)
        gripper = self._calibration.joints[-1]
        gripper_ticks_s = GRIPPER_RANGES_S * (gripper.range_max - gripper.range_min)
        self.expect_steps(
            [STEP_S * BODY_TICKS_S] * (len(self.servos) - 1) + [STEP_S * gripper_ticks_s]
        )
        self.frames_seen = self.eprom_writes = 0
        self.violations, self.goals, self.writes = (deque(maxlen=LOG_LENGTH) for _ in range(3))
        self.echo = False
        self._faults = {}  # (kind, id) -> count left, value
        self._random = random.Random(0)
        self._outbox = []
        self._queued = 0
        self._free_s = dict.fromkeys(self.servos, 0.0)
        self._code, self._start_s = 0, now_s  # of the instruction that is obeyed

    def inject(self, kind, servo_id=1, count=1, value=0.0):
        """A fault of a servo, for its next `count` answers or writes (-1: always, 0: no more).

        Answers: "mute" none, "corrupt" wrong checksum, "delay" `value` seconds late, "truncate" cut
        after `value` bytes, "trickle" `value` seconds between bytes, "noise" `value` bytes (0: 5)
        and FF FF FF before it, "wrong_id" comes as id `value` (0: its own + 100), "wrong_length"
        with `value` bytes (0: 1) too many, "bad_error" ERROR byte above 0x7F, "duplicate" given
        twice, as by two servos with one id.
        Writes: "lost_write" acknowledged, but the register at address `value` stays as it was.
        Until it is changed: "error" has `value` as its ERROR byte, "stuck" is blocked (count 0:
        free again), and "echo" makes the adapter repeat every request.
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

    def expect_steps(self, ticks):
        """Bound the step between two goals of each servo, [6] ticks. Rounding can add one."""
        for servo, bound in zip(self.servos.values(), ticks, strict=True):
            servo.max_step = bound + ROUNDING_TICKS

    def receive(self, data):
        if self.echo:
            self._queue(data, self._now_s)
        super().receive(data)

    def due(self):
        """Answers that are on the wire by now."""
        data = b""
        while self._outbox and self._outbox[0][0] <= self._now_s:
            data += heapq.heappop(self._outbox)[2]
        return data

    @property
    def next_due_s(self):
        """When the next answer is due; infinite for none."""
        return self._outbox[0][0] if self._outbox else math.inf

    def _obey(self, frame):
        self.frames_seen += 1
        self._code, self._start_s = frame.code, self._now_s
        if frame.code not in set(Instruction):
            self.violations.append(f"instruction {frame.code} to id {frame.id}")
        try:
            super()._obey(frame)
        except (IndexError, ValueError, BusError):
            self.violations.append(f"malformed instruction {frame.code}: {frame.params.hex(' ')}")

    def _write(self, servo, address, data):
        touched = servo.touched(address, data)
        unlogged = STREAMED if self._code == Instruction.SYNC_WRITE else ()
        _, lost_at = self._faults.get(("lost_write", servo.id), (0, -1))
        lost = {
            r for r in touched if r.address == lost_at and self._strikes("lost_write", servo.id)
        }
        self.violations += servo.objections(address, data)
        servo.write(address, data, lost)
        self.eprom_writes += sum(register.area == "EPROM" for register in touched)
        self.writes += [
            Write(self._now_s, servo.id, r, v) for r, v in touched.items() if r not in unlogged
        ]
        if Register.GOAL_POSITION in touched:
            self.goals.append(Goal(self._now_s, servo.id, touched[Register.GOAL_POSITION]))

    def _strikes(self, kind, servo_id):
        """Whether this fault strikes now; that uses up one of its count."""
        left, value = self._faults[kind, servo_id]
        self._faults[kind, servo_id] = left - (left > 0), value
        return left != 0

    def _answer(self, servo, params):
        """Queue one answer, spoiled by the faults."""
        faults = {
            kind: value
            for (kind, servo_id), (_, value) in [*self._faults.items()]
            if servo_id == servo.id and kind != "lost_write" and self._strikes(kind, servo_id)
        }
        if "mute" in faults:
            return
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
            data = (
                self._random.randbytes(int(faults["noise"]) or NOISE_BYTES) + b"\xff\xff\xff" + data
            )
        # One servo answers in order: what follows a late answer is at least as late.
        due_s = max(self._start_s + faults.get("delay", 0.0), self._free_s[servo.id])
        if "trickle" in faults:
            for byte in data:
                self._queue(bytes((byte,)), due_s)
                due_s += faults["trickle"]
        else:
            self._queue(data, due_s)
        self._free_s[servo.id] = due_s
        if self._code == Instruction.SYNC_READ:
            self._start_s = due_s  # each waits for the one before it

    def _queue(self, data, due_s):
        self._queued += 1
        heapq.heappush(self._outbox, (due_s, self._queued, data))


class FaultyCamera(VirtualCamera):
    """A camera that can behave as it is told, see FaultyHardware.camera."""

    def __init__(self, name, path, width, height):
        self.mode, self.fps, self._image, self._due_s = "live", 0.0, None, 0.0
        super().__init__(name, path, width, height)
        self._render = partial(self._draw, self._render)

    def show(self, raw):
        time_s, slow = time.monotonic(), self.mode == "slow"
        if self.mode == "stall" or (slow and time_s < self._due_s):
            return
        super().show(raw)
        # The nearest round that there is.
        self._due_s = time_s + (1 / self.fps - PICTURE_PERIOD_S / 2 if slow else 0.0)

    def _draw(self, render, raw):
        if self.mode != "freeze":
            self._image = render(raw)
        return self._image


class FaultyHardware(VirtualHardware):
    """Also answers pickled requests on standard input. cameras: {name: FaultyCamera}."""

    def __init__(self, bus, cameras):
        self._named, self._plugged, self._deaf = cameras, True, False
        super().__init__(bus, [*cameras.values()])

    def run(self):
        wait_s = MOTION_PERIOD_S
        with suppress(EOFError):
            while True:
                heard = [self._master] if self._plugged and not self._deaf else []
                readable, _, _ = select.select([*heard, 0], [], [], wait_s)
                self.bus.advance(time.monotonic())
                if self._master in readable:
                    self.bus.receive(os.read(self._master, 4096))
                if 0 in readable:
                    sys.stdout.buffer.write(
                        pickle.dumps(self._reply(*pickle.load(sys.stdin.buffer)))
                    )
                    sys.stdout.buffer.flush()
                answers = self.bus.due()
                with suppress(BlockingIOError):
                    if self._plugged:
                        os.write(self._master, answers)
                wait_s = min(MOTION_PERIOD_S, max(0.0, self.bus.next_due_s - time.monotonic()))

    def deaf(self, on):
        """Stop reading the port, so that its buffer fills; False: read on."""
        self._deaf = on

    def hang_up(self):
        """Unplug the adapter, for good: the port is gone, the servos go on."""
        if self._plugged:
            self._plugged = False
            os.close(self._slave)
            os.close(self._master)

    def reset(self):
        """New servos, no faults, live cameras, empty logs, nothing waiting in the port."""
        self._deaf = False
        with suppress(BlockingIOError):
            while self._plugged:
                os.read(self._master, 65536)
        self.bus.reset(time.monotonic())
        for name in self._named:
            self.camera(name, "live")

    def camera(self, name, mode, fps=0.0):
        """How a camera behaves: "live", "stall" (no new pictures), "freeze" (the same picture),
        "slow" (`fps`).
        """
        camera = self._named[name]
        camera.fps, camera.mode = fps, mode  # in this order: another thread reads them

    def _reply(self, name, arguments, named):
        try:
            if name in ("deaf", "hang_up", "reset", "camera"):
                return getattr(self, name)(*arguments, **named)
            if hasattr(self.bus, name):
                found = getattr(self.bus, name)
                if callable(found):
                    return found(*arguments, **named)
                return list(found) if isinstance(found, deque) else found
            return getattr(self.bus.servos[arguments[0]], name)(*arguments[1:], **named)
        except Exception as error:  # whatever it is, it is the caller's
            return error


def build(paths, width, height, pose):
    bus = FaultyBus(VIRTUAL_CALIBRATION, time.monotonic(), pose)
    cameras = {name: FaultyCamera(name, path, width, height) for name, path in paths.items()}
    return FaultyHardware(bus, cameras)


def main():
    serve(build)


_PROGRAM = f"""
import sys
sys.path[0] = {str(TESTS)!r}
from support.faulty_arm import main
main()
"""


class FaultyArm(VirtualArm):
    """Every other attribute is a call into the process.

    deaf, hang_up, reset and camera of FaultyHardware, a method or value of FaultyBus, or, with its
    id first, a method of a FaultyServo.
    """

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named, command=(sys.executable, "-c", _PROGRAM))

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return partial(self._ask, name)

    def _ask(self, name, *arguments, **named):
        try:
            self._to.write(pickle.dumps((name, arguments, named)))
            self._to.flush()
        except (OSError, ValueError) as error:
            raise DeviceError(f"the virtual arm has ended: {error}. Start another.") from error
        answer = None
        if select.select([self._from], [], [], ANSWER_LIMIT_S)[0]:
            with suppress(EOFError):
                answer = (pickle.load(self._from),)
        if answer is None:
            raise DeviceError(f"the virtual arm said nothing (exit status {self._process.poll()}).")
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]
