"""Which groups of layers become INT8: by time saved for the error that each brings, as far as the gate allows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..runtime.bundle import Target
from ..runtime.roofline import find_board
from .gate import Errors, Gate


@dataclass(frozen=True)
class Machine:
    """What a target is expected to run on, for the order of the groups only. Operations and bytes a second."""

    float_rate: float
    float_bytes: int  # of one weight
    int8_rate: float
    bandwidth: float


_NANO = find_board("Orin Nano 8GB Super")
MACHINES: dict[Target, Machine] = {
    "cpu": Machine(4.5e11, 4, 1.3e12, 2e10),  # two cores with VNNI, measured (docs/log.md)
    "portable": Machine(1e12 * _NANO.float_tflops, 2, 1e12 * _NANO.int8_tops, 1e9 * _NANO.gb_s),
}


@dataclass(frozen=True)
class Cost:
    """One Linear: tokens in a run, its weight's size, and how often it runs for one chunk."""

    rows: int
    weights: int
    runs: int

    @property
    def multiply_adds(self) -> int:
        return self.rows * self.weights * self.runs

    def saved_s(self, machine: Machine) -> float:
        """Seconds of a chunk that INT8 saves, each product bound by arithmetic or by reading its weights."""

        def seconds(rate: float, weight_bytes: int) -> float:
            return max(2 * self.rows * self.weights / rate, weight_bytes * self.weights / machine.bandwidth)

        return self.runs * (seconds(machine.float_rate, machine.float_bytes) - seconds(machine.int8_rate, 1))


def order(measured: Mapping[str, tuple[float, Errors]], gate: Gate) -> list[str]:
    """Groups by seconds saved per share of the gate used up, best first. measured: group -> (seconds, errors)."""
    return sorted(measured, key=lambda g: measured[g][0] / max(measured[g][1].share(gate), 1e-6), reverse=True)


def choose(groups: Sequence[str], errors_of: Callable[[list[str]], Errors], gate: Gate) -> list[str]:
    """All groups where that meets the gate, else in order each that leaves it met together with those before it."""
    if errors_of(list(groups)).share(gate) <= 1:
        return list(groups)
    taken: list[str] = []
    for group in groups:
        if errors_of([*taken, group]).share(gate) <= 1:
            taken.append(group)
    return taken
