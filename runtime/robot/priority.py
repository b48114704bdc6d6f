"""The control thread must not wait for the threads that compute a chunk."""

import os
import threading
from contextlib import suppress
from pathlib import Path

CONTROL_PRIORITY, POLICY_NICE = 10, 10


def raise_priority() -> str:
    """Put this thread before all others of this process; -> what was possible. Threads that are
    started later keep the normal priority."""
    with suppress(OSError):
        os.sched_setscheduler(
            0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(CONTROL_PRIORITY)
        )
        return "real-time priority"
    # To raise a thread needs a permission, to lower the others does not.
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            with suppress(OSError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, int(task.name), POLICY_NICE)
    return "normal priority, the policy below it (real-time priority needs root or an rtprio limit)"
