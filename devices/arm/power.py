"""Switch servos on without a jump, and off in every case."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...core.errors import ArmError, DeviceError, listed
from ..bus.bus import FeetechBus
from ..bus.frames import BROADCAST_ID
from ..bus.sts3215 import Register, error_names
from .calibration import IDS, joint_label
from .eeprom import write_verified
from .inspection import ERROR_ADVICE

RAMP_ACCELERATION = 50  # 5000 step/s^2, until the first target has been reached
JUMP_TICKS, JUMP_WINDOW_S = 20, 0.1
SINK_STEPS, SINK_STEP_S = 8, 0.05


@dataclass(frozen=True)
class ReleaseResult:
    """`unconfirmed`: joints that may still be energised, with the reason for each."""

    unconfirmed: dict[str, str]

    @property
    def message(self) -> str:
        unconfirmed = (f"{name}: {reason}" for name, reason in self.unconfirmed.items())
        return listed(
            "these servos may still be energised. Switch the arm's power off.", unconfirmed
        )


def switch_on(
    bus: FeetechBus, servo_id: int, goal_velocity: int, torque_limit: int, beat: Callable[[], None]
) -> int:
    """Set up one servo, make its position its goal, switch it on. Returns that goal, raw ticks.

    A servo that is already on (its run has died) stays on: it must not drop. ArmError if it would
    jump, jumps, or reports an error. beat: called at least every 50 ms.
    """
    label = joint_label(servo_id)
    beat()
    bus.write(servo_id, Register.ACCELERATION, RAMP_ACCELERATION)
    bus.write(servo_id, Register.GOAL_VELOCITY, goal_velocity)
    bus.write(servo_id, Register.TORQUE_LIMIT, torque_limit)
    present = bus.read(servo_id, Register.PRESENT_POSITION).value
    write_verified(bus, servo_id, Register.GOAL_POSITION, present)
    error = bus.write(servo_id, Register.TORQUE_ENABLE, 1)
    if error:
        raise ArmError(
            f"{label} reports {', '.join(error_names(error))} when switched on. {ERROR_ADVICE}"
        )
    until = time.monotonic() + JUMP_WINDOW_S
    while time.monotonic() < until:
        beat()
        moved = bus.read(servo_id, Register.PRESENT_POSITION).value - present
        if abs(moved) > JUMP_TICKS:
            raise ArmError(
                f"{label} moved {moved} ticks when switched on, expected at most {JUMP_TICKS}. "
                "Rest the arm, keep hands off, and look for a wrong calibration."
            )
        time.sleep(JUMP_WINDOW_S / 5)
    return present


def sink(
    bus: FeetechBus,
    present: Mapping[int, int],
    afterwards: Mapping[int, int],
    beat: Callable[[], None],
) -> None:
    """Lower Torque_Limit of every servo to 0 over 0.4 s, then switch all servos off.

    present: the limits now, afterwards: the limits to set at the end, {id: 0.1 %}.
    """
    for step in range(SINK_STEPS - 1, -1, -1):
        beat()
        bus.sync_write(
            Register.TORQUE_LIMIT, {i: v * step // SINK_STEPS for i, v in present.items()}
        )
        time.sleep(SINK_STEP_S)
    bus.broadcast_torque_off()
    # Nothing else writes this register. At 0, the arm stays limp until its power is cut.
    bus.sync_write(Register.TORQUE_LIMIT, afterwards)


def switch_off(bus: FeetechBus) -> ReleaseResult:
    """Switch every servo off and verify it. A failed servo does not keep the others on.

    Raises only an interrupt, after the last servo has been tried.
    """
    interrupt: BaseException | None = None
    unconfirmed: dict[int, str] = {}
    # Broadcast first: it reaches all servos at once and needs no answer.
    for servo_id in (BROADCAST_ID, *IDS):
        try:
            if servo_id == BROADCAST_ID:
                bus.broadcast_torque_off()
            elif bus.read(servo_id, Register.TORQUE_ENABLE).value:
                write_verified(bus, servo_id, Register.TORQUE_ENABLE, 0)
        except DeviceError as error:
            unconfirmed[servo_id] = str(error)
        except BaseException as error:
            interrupt, unconfirmed[servo_id] = error, "interrupted"
    if interrupt is not None:
        raise interrupt
    return ReleaseResult({joint_label(i): unconfirmed[i] for i in IDS if i in unconfirmed})
