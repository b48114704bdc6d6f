"""What the servos report, with one request per tick.

A servo that does not answer keeps its last values, and their age grows. A position that the servo
cannot have reached since the last one is rejected.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.errors import BusError
from ..bus.bus import BlockReading, FeetechBus
from ..bus.sts3215 import NO_LOAD_TICKS_PER_S, Register
from .calibration import IDS, Calibration, joint_label
from .units import Units, to_values

FIRST, LAST = Register.PRESENT_POSITION, Register.PRESENT_CURRENT
UNBELIEVED_READINGS = 3
JUMP_FACTOR, JUMP_SLACK_TICKS = 1.5, 20
MA_PER_STEP = 6.5


@dataclass(frozen=True)
class JointState:
    """One reading of all joints; arrays are [6].

    time_s: of the request, monotonic. position: float64 robot units. raw: ticks. velocity: ticks/s.
    load: % of full duty, signed. current: mA. errors: ERROR byte. age_s: of each joint's values, 0
    if it answered now. missed: consecutive readings without an accepted answer.
    """

    time_s: float
    position: NDArray[np.float64]
    raw: NDArray[np.int64]
    velocity: NDArray[np.int64]
    load: NDArray[np.float64]
    voltage: NDArray[np.float64]
    temperature: NDArray[np.int64]
    current: NDArray[np.float64]
    errors: tuple[int, ...]
    age_s: NDArray[np.float64]
    missed: tuple[int, ...]
    jumps: tuple[int, ...]  # consecutive readings that were rejected


class Telemetry:
    """Reads the arm on `bus`.

    The first `read` raises BusError if a joint is missing. Later it raises only for a bad line.
    """

    def __init__(self, bus: FeetechBus, calibration: Calibration, units: Units) -> None:
        self._bus, self._calibration, self._units = bus, calibration, units
        self._last: dict[int, BlockReading] = {}
        self._seen_s = dict.fromkeys(IDS, 0.0)
        self.trust()

    def read(self, budget_s: float = math.inf) -> JointState:
        """Read all joints in one request. budget_s: the limit for asking missing joints again."""
        time_s = time.monotonic()
        blocks = self._bus.sync_read(IDS, FIRST, LAST, budget_s)
        if not self._last and (missing := [joint_label(i) for i in IDS if i not in blocks]):
            raise BusError(
                f"no answer from {', '.join(missing)} on {self._bus.path}. Check cable and power."
            )
        for servo_id in IDS:
            self._take(servo_id, blocks.get(servo_id), time_s)
        return self._state(time_s)

    def powered_off(self, budget_s: float = math.inf) -> tuple[int, ...]:
        """Ids of the servos whose torque is off; those that do not answer are left out."""
        blocks = self._bus.sync_read(IDS, Register.TORQUE_ENABLE, budget_s=budget_s)
        return tuple(i for i, block in blocks.items() if block.values[Register.TORQUE_ENABLE] == 0)

    def trust(self) -> None:
        """Accept the next position of each joint, whatever it is, as after a stop that was
        resolved.
        """
        self._fresh = set(IDS)  # servos whose next position is accepted
        self._jumps, self._missed = dict.fromkeys(IDS, 0), dict.fromkeys(IDS, 0)

    def _take(self, servo_id: int, block: BlockReading | None, time_s: float) -> None:
        if block is None:
            self._bus.counters["unanswered_readings"] += 1
        elif servo_id not in self._fresh:
            moved = abs(block.values[FIRST] - self._last[servo_id].values[FIRST])
            elapsed_s = time_s - self._seen_s[servo_id]
            # After three implausible readings, reject the encoder until reset.
            rejected = self._jumps[servo_id] >= UNBELIEVED_READINGS
            if rejected or moved > JUMP_FACTOR * (
                NO_LOAD_TICKS_PER_S * elapsed_s + JUMP_SLACK_TICKS
            ):
                self._jumps[servo_id] += 1
                self._bus.counters["unbelieved_positions"] += 1
                block = None
        if block is None:
            self._missed[servo_id] += 1
            return
        self._fresh.discard(servo_id)
        self._last[servo_id], self._seen_s[servo_id] = block, time_s
        self._missed[servo_id] = self._jumps[servo_id] = 0

    def _state(self, time_s: float) -> JointState:
        blocks = [self._last[i] for i in IDS]

        def column(register: Register) -> NDArray[np.int64]:
            return np.array([b.values[register] for b in blocks], np.int64)

        raw = column(FIRST)
        return JointState(
            time_s=time_s,
            position=to_values(raw, self._calibration, self._units),
            raw=raw,
            velocity=column(Register.PRESENT_VELOCITY),
            load=column(Register.PRESENT_LOAD) / 10,
            voltage=column(Register.PRESENT_VOLTAGE) / 10,
            temperature=column(Register.PRESENT_TEMPERATURE),
            # Sources disagree about its sign, but not about its amount.
            current=np.abs(column(LAST)) * MA_PER_STEP,
            errors=tuple(b.error | b.values[Register.STATUS] for b in blocks),
            age_s=np.array([time_s - self._seen_s[i] for i in IDS]),
            missed=tuple(self._missed.values()),
            jumps=tuple(self._jumps.values()),
        )
