"""The state of a run, with every transition in one place."""

from enum import Enum


class Phase(Enum):
    """What the arm is doing."""

    RUN = "run"  # actions of the queue are sent; while there is none the arm holds
    STOP = "stop"  # latched: the arm holds until the operator resumes
    PARK = "park"  # the arm goes back to where it was switched on, then the run ends
    DONE = "done"  # the arm is parked


_NEXT = {
    Phase.RUN: {Phase.STOP, Phase.PARK},
    Phase.STOP: {Phase.RUN, Phase.PARK},
    Phase.PARK: {Phase.STOP, Phase.DONE},
    Phase.DONE: set(),
}


class RunState:
    """Begins in RUN.

    `ending`: the run ends after parking; a stop in between does not change that. `outcome`: what is
    raised then, None for a normal end.
    """

    def __init__(self) -> None:
        self.phase = Phase.RUN
        self.ending = False
        self.outcome: BaseException | None = None

    def stop(self) -> None:
        """RUN or PARK -> STOP."""
        self._enter(Phase.STOP)

    def resume(self) -> None:
        """STOP -> RUN. A run that was ending is parked instead."""
        assert not self.ending, "park() again"
        self._enter(Phase.RUN)

    def park(self, outcome: BaseException | None) -> None:
        """RUN or STOP -> PARK; the run ends with `outcome`."""
        self.ending, self.outcome = True, outcome
        self._enter(Phase.PARK)

    def arrived(self) -> None:
        """PARK -> DONE."""
        self._enter(Phase.DONE)

    def _enter(self, phase: Phase) -> None:
        assert phase in _NEXT[self.phase], f"no way from {self.phase} to {phase}"
        self.phase = phase
