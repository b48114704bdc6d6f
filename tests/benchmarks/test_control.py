"""smolvla-bench control on the virtual arm."""

import os
from pathlib import Path

from smolvla_edge.benchmarks.result import read


def test_control_runs_the_loop_on_the_virtual_arm(export_case, bench):
    line = ["--bundle", export_case("tiny", "fp32"), "--device", "cpu", "--seconds", "1"]
    bench("control", *line, "--fps", "20")
    result = read(Path("control.json"))
    (loop,) = result.loops
    assert loop.fps == 20
    assert loop.counts["ticks"] == len(loop.queued) == len(loop.late_ms.values)
    assert max(loop.queued) > 0
    assert loop.capture_ms.p50 > 0
    # The policy leaves a core to the loop.
    assert result.machine.threads == max(1, len(os.sched_getaffinity(0)) - 1)
