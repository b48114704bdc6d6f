"""From telemetry to warnings and stops. No clock and no port: every reading has its time.

The caller latches a stop; here each one is reported once. Thresholds come from `Limits`, or from
the servo's registers if those are stricter. All durations are shorter than the servo's own trip
times (2 s of overload, 2 s of overcurrent).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..bus.sts3215 import Register, error_names
from .calibration import IDS, joint_label
from .limits import JOINTS, TICKS_PER_DEG, Limits
from .telemetry import MA_PER_STEP, UNBELIEVED_READINGS, JointState

GRIPPER = JOINTS - 1
# Encoder, overheat, overcurrent, overload: the servo is about to switch off, or it cannot be
# trusted.
STOPPING_BITS = 0x02 | 0x04 | 0x08 | 0x20
LATE_READINGS, LOST_READINGS, LOST_S = 2, 5, 0.2
VOLTAGE_MARGIN_V, VOLTAGE_STOP_S, VOLTAGE_DROP_S = 0.5, 0.5, 0.2
CURRENT_WARN_S = 0.5
STALL_DEG, STALL_TICKS_S, STALL_S = 5.0, 30, 1.0
LOAD_WARN_S, LOAD_STOP_S = 1.0, 1.5
TRIP_SHARE = 0.75  # of the load, or of the time, at which the servo itself gives up
FOLLOWING_WARN_S, FOLLOWING_STOP_S = 0.5, 1.0
# A goal leads by Limits.lead_deg at most. A joint that cannot follow stays this close below it.
LEAD_SLACK_DEG = 1.0


@dataclass(frozen=True)
class Verdict:
    """New findings; each is reported once.

    warnings. stops: why the arm must hold. unload: joints (0 to 5) whose goal becomes their
    position. ease: joints that must press less.
    """

    warnings: list[str]
    stops: list[str]
    unload: list[int]
    ease: list[int]


class Monitors:
    """Watches one arm. registers: {id: {register: value}}, as read before the start."""

    def __init__(self, limits: Limits, registers: Mapping[int, Mapping[Register, int]]) -> None:
        self._limits, self._registers = limits, registers
        self._since: dict[tuple[str, int], float] = {}
        self._told: set[tuple[str, int, bool]] = set()
        self._volts: list[tuple[float, JointState]] = []
        self._behind_deg = min(limits.following_stop_deg, limits.lead_deg - LEAD_SLACK_DEG)

    def reset(self) -> None:
        """After a stop: restart every duration, and report everything again."""
        self._since.clear()
        self._told.clear()
        self._volts.clear()

    def check(self, state: JointState, goal_raw: ArrayLike | None) -> Verdict:
        """Check one reading. goal_raw: the goals to follow, [6] raw ticks; None while the arm is
        limp.
        """
        self._volts = [(t, s) for t, s in self._volts if state.time_s - t <= VOLTAGE_DROP_S] + [
            (state.time_s, state)
        ]
        verdict = Verdict([], [], [], [])
        goal = state.raw if goal_raw is None else np.asarray(goal_raw)
        error_deg = np.abs(goal - state.raw) / TICKS_PER_DEG
        for joint in range(JOINTS):
            for signal, is_stop, text in self._joint(joint, state, error_deg[joint], verdict):
                if (signal, joint, is_stop) not in self._told:
                    self._told.add((signal, joint, is_stop))
                    (verdict.stops if is_stop else verdict.warnings).append(
                        f"{joint_label(IDS[joint])}: {text}"
                    )
        return verdict

    def _joint(
        self, joint: int, state: JointState, error_deg: float, verdict: Verdict
    ) -> list[tuple[str, bool, str]]:
        """All findings of one joint: (signal, is a stop, text). Adds joints to `verdict`."""
        limits, registers = self._limits, self._registers[IDS[joint]]
        found: list[tuple[str, bool, str]] = []

        def lasts(signal: str, condition: bool, seconds: float) -> bool:
            """Whether the condition has held for so long."""
            if not condition:
                self._since.pop((signal, joint), None)
                return False
            return state.time_s - self._since.setdefault((signal, joint), state.time_s) >= seconds

        # Telemetry itself
        if state.jumps[joint] >= UNBELIEVED_READINGS:
            found.append(
                (
                    "jump",
                    True,
                    f"{state.jumps[joint]} positions in a row not believed: encoder or line",
                )
            )
        elif state.missed[joint] >= LOST_READINGS or state.age_s[joint] > LOST_S:
            found.append(
                ("lost", True, f"no answer for {state.age_s[joint]:.2f} s. Check cable and power")
            )
        elif state.missed[joint] >= LATE_READINGS:
            found.append(("lost", False, f"no answer {state.missed[joint]} times in a row"))

        if bits := state.errors[joint]:
            stop = bool(bits & STOPPING_BITS)
            found.append((f"bits {bits}", stop, f"reports {', '.join(error_names(bits))}"))
            if stop:
                verdict.unload.append(joint)

        celsius, own_c = state.temperature[joint], registers[Register.MAX_TEMPERATURE_LIMIT]
        if celsius >= min(limits.temperature_stop_c, own_c - 5):
            found.append(("temperature", True, f"{celsius} C. Let it cool"))
        elif celsius >= min(limits.temperature_warn_c, own_c - 15):
            found.append(("temperature", False, f"{celsius} C"))

        volt = state.voltage[joint]
        low, high = (
            registers[Register.MIN_VOLTAGE_LIMIT] / 10,
            registers[Register.MAX_VOLTAGE_LIMIT] / 10,
        )
        drop = max(float(s.voltage[joint]) for _, s in self._volts) - volt
        if lasts("volts", not low <= volt <= high, VOLTAGE_STOP_S):
            found.append(("voltage", True, f"supply {volt:.1f} V, expected {low} to {high} V"))
        elif drop > limits.voltage_drop_v:
            found.append(
                (
                    "voltage",
                    True,
                    f"supply fell by {drop:.1f} V at once. Check power supply and plug",
                )
            )
        elif not low + VOLTAGE_MARGIN_V <= volt <= high - VOLTAGE_MARGIN_V:
            found.append(("voltage", False, f"supply {volt:.1f} V, limits {low} to {high} V"))

        milliamps, own_ma = (
            state.current[joint],
            registers[Register.PROTECTION_CURRENT] * MA_PER_STEP,
        )
        stalled = (
            milliamps > own_ma
            and error_deg > STALL_DEG
            and abs(state.velocity[joint]) < STALL_TICKS_S
        )
        stalls = lasts("stall", bool(stalled), STALL_S)
        if lasts("current", milliamps > own_ma * limits.current_warn_pct / 100, CURRENT_WARN_S):
            found.append(
                ("current", False, f"{milliamps:.0f} mA, its protection trips at {own_ma:.0f}")
            )

        load, own_load = abs(state.load[joint]), registers[Register.OVERLOAD_TORQUE]
        stop_s = min(LOAD_STOP_S, TRIP_SHARE * registers[Register.PROTECTION_TIME] / 100)
        overloaded = lasts("overload", load > min(limits.load_stop_pct, own_load), stop_s)
        # A gripper that holds something never arrives. LeRobot lets it trip at 25 % load.
        if joint == GRIPPER:
            if stalls or overloaded:
                verdict.ease.append(joint)
                text = (
                    f"holds something firmly ({milliamps:.0f} mA, load {load:.0f} %): pressing less"
                )
                found.append(("firm", False, text))
            return found
        if stalls:
            found.append(("stall", True, f"blocked: {milliamps:.0f} mA and no motion. Free it"))
        if overloaded:
            found.append(
                ("load", True, f"load {load:.0f} % for {stop_s} s. Free it, or lighten its load")
            )
        elif lasts("load", load > min(limits.load_warn_pct, TRIP_SHARE * own_load), LOAD_WARN_S):
            found.append(("load", False, f"load {load:.0f} %"))

        behind = lasts("behind", error_deg >= self._behind_deg, FOLLOWING_STOP_S)
        if behind:
            hint = (
                ""
                if state.velocity[joint]
                else " It does not move: blocked, or see Goal_Velocity and Phase"
            )
            found.append(("following", True, f"{error_deg:.0f} deg behind its goal.{hint}"))
        elif lasts(
            "lag", error_deg >= min(limits.following_warn_deg, self._behind_deg), FOLLOWING_WARN_S
        ):
            found.append(("following", False, f"{error_deg:.0f} deg behind its goal"))
        if stalls or overloaded or behind:
            verdict.unload.append(joint)
        return found
