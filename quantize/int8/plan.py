"""Which groups of layers become INT8: the most time saved for their error, within the gate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...runtime.budget.roofline import BoardPeaks, find_board
from ...runtime.bundle.manifest import Target
from .gate import Errors, Gate

# What a target usually runs on, for the order of the groups only, and the bytes of a float weight.
MACHINES: dict[Target, tuple[BoardPeaks, int]] = {
    "cpu": (BoardPeaks("two cores with VNNI", 0.45, 1.3, 20, "measured (docs/log.md)"), 4),
    "portable": (find_board("Orin Nano 8GB Super"), 2),
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

    def saved_s(self, target: Target) -> float:
        """Seconds of a chunk that INT8 saves, bound by arithmetic or by reading weights."""
        board, float_bytes = MACHINES[target]

        def seconds(tera: float, weight_bytes: int) -> float:
            return self.weights * max(2 * self.rows / tera / 1e12, weight_bytes / board.gb_s / 1e9)

        return self.runs * (seconds(board.float_tflops, float_bytes) - seconds(board.int8_tops, 1))


def order(measured: Mapping[str, tuple[float, Errors]], gate: Gate) -> list[str]:
    """Groups by seconds saved for their share of the gate, best first.

    measured: group -> (seconds, errors).
    """
    return sorted(
        measured, key=lambda g: measured[g][0] / max(measured[g][1].share(gate), 1e-6), reverse=True
    )


def choose(
    groups: Sequence[str], errors_of: Callable[[list[str]], Errors], gate: Gate
) -> list[str]:
    """All groups where they meet the gate together.

    Else, in order, each group that meets the gate together with those before it.
    """
    if errors_of(list(groups)).share(gate) <= 1:
        return list(groups)
    taken: list[str] = []
    for group in groups:
        if errors_of([*taken, group]).share(gate) <= 1:
            taken.append(group)
    return taken
