"""The verdict of a rehearsal, and the summary of a run."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from smolvla_edge.core import command
from smolvla_edge.core.errors import CheckFailed
from smolvla_edge.devices.arm.motion import MotionCounts
from smolvla_edge.runtime.robot import rehearsal as report
from smolvla_edge.runtime.robot import summary as lines_of_a_run
from smolvla_edge.runtime.robot.checked_run import CheckedRun
from smolvla_edge.runtime.robot.loop import Tick
from smolvla_edge.runtime.robot.run_statistics import Counts, Distribution, RunStatistics
from smolvla_edge.runtime.robot.settings import Settings
from smolvla_edge.runtime.robot.summary import StatusLine, summary


def good_log(period_error_ms=(0.2,) * 299, chunks=3, **counts):
    return RunStatistics(
        counts=Counts(**{"ticks": 300, "acted": 290, "held": 10} | counts),
        chunk_ms=Distribution([250.0] * chunks),
        seams_deg=Distribution([1.5, 4.25]),
        gaps_deg=Distribution([3.0, 9.0]),
        period_error_ms=Distribution(period_error_ms),
        late_ms=Distribution([0.1] * 300),
        busy_ms=Distribution([2.0] * 300),
        read_ms=Distribution([1.0] * 300),
        write_ms=Distribution([0.5] * 300),
    )


def plan_for(chunking="async"):
    return CheckedRun(Settings(chunking=chunking), None, None, None, None, "", "", 30.0)


def judge(log, *, motion=None, chunking="async", failure=""):
    report.judge(
        log, motion or MotionCounts(accepted=290), {"retries": 2}, plan_for(chunking), failure
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_report(folder):
    assert [path.name for path in folder.iterdir()] == [report.REHEARSAL]
    return json.loads((folder / report.REHEARSAL).read_text())


def test_a_good_rehearsal_passes_and_leaves_a_report(folder, capsys):
    judge(good_log())
    found = read_report(folder)
    assert found["passed"]
    assert all(check["passed"] for check in found["checks"])
    assert found["counts"]["ticks"] == 300
    assert found["motion"]["accepted"] == 290
    assert (found["bus"], found["fps"], found["chunking"]) == ({"retries": 2}, 30.0, "async")
    assert "rehearsal passed, see rehearsal.json" in capsys.readouterr().out


# what would have gone wrong -> the check that notices
FAULTS = {
    "the loop ran to its end": {"failure": "camera 'front' has had no usable picture for 2 s"},
    "none is missed": {"missed": 4},
    "actions do not run out": {"starved": 1},
    "every joint answers": {"unanswered": 4},
    "cameras deliver": {"blind": 1},
    "chunks are finite": {"bad_chunks": 1},
    "chunks are in time": {"late_chunks": 1},
    "no target is rejected": {"rejected": 1},
    "limits change nothing": {"motion": MotionCounts(accepted=290, limited=3)},
}


@pytest.mark.parametrize("check", FAULTS)
def test_each_fault_fails_its_own_check(folder, capsys, check):
    fault = dict(FAULTS[check])
    options = {name: fault.pop(name) for name in ("failure", "motion") if name in fault}
    with pytest.raises(CheckFailed, match=f"the rehearsal failed: {check}$"):
        judge(good_log(**fault), **options)
    found = read_report(folder)
    assert not found["passed"]
    assert [c["name"] for c in found["checks"] if not c["passed"]] == [check]
    assert f"FAIL  {check}" in capsys.readouterr().out


def test_ticks_off_their_time_no_chunks_and_warnings_fail_it_too(folder):
    # over 1 % of them, over a quarter of 33 ms
    log = good_log([0.2] * 295 + [9.0] * 4, chunks=0)
    log.warn("gripper: 56 C")
    with pytest.raises(
        CheckFailed, match="it had chunks to execute, ticks come on time, nothing warns"
    ):
        judge(log)
    assert (
        next(c["found"] for c in read_report(folder)["checks"] if c["name"] == "nothing warns")
        == "gripper: 56 C"
    )


def test_a_run_that_never_ticked_fails_rather_than_divides_by_nothing(folder):
    with pytest.raises(CheckFailed, match="it had chunks to execute, ticks come on time"):
        judge(RunStatistics(), motion=MotionCounts(), failure="the arm cannot be read")
    assert not read_report(folder)["passed"]


def test_sync_may_hold_between_chunks(folder):
    judge(good_log(starved=40), chunking="sync")
    assert read_report(folder)["passed"]


def test_a_few_missed_ticks_and_short_readings_are_forgiven(folder):
    judge(good_log(missed=3, unanswered=3), motion=MotionCounts(accepted=290, limited=2))
    assert read_report(folder)["passed"]


def test_a_report_is_replaced_whole_or_not_at_all(folder, monkeypatch):
    judge(good_log())
    before = (folder / report.REHEARSAL).read_text()

    def full_disk(path, data):
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space"):
            judge(good_log(missed=0))
    assert (folder / report.REHEARSAL).read_text() == before
    judge(good_log(ticks=301))
    assert read_report(folder)["counts"]["ticks"] == 301


def test_the_summary_tells_timing_starvation_and_seams_apart():
    lines = summary(
        good_log(starved=7, missed=2), 1 / 30, MotionCounts(accepted=290), {}
    ).splitlines()
    table = {line[:28].strip(): line[28:].split() for line in lines[:10]}
    assert table["milliseconds"] == ["p50", "p95", "p99", "max", "n"]
    assert table["chunk, as the loop saw it"] == ["250.00"] * 4 + ["3"]
    assert table["tick: period off by"] == ["0.20"] * 4 + ["299"]
    assert table["tick: read the arm"][-1] == "300"
    text = "\n".join(lines)
    assert "300 ticks of 33.3 ms, 2 missed: 290 with an action, 10 held" in text
    assert "(7 of them after the first action)" in text
    assert (
        "2 seams: chunks disagree by 6.0 deg median, 9.0 at most; "
        "the first step of the new one is 2.9 deg" in text
    )
    assert "warning" not in text


def test_the_summary_warns_where_limits_change_the_policy_or_ticks_are_lost():
    motion = MotionCounts(accepted=200, slewed=3, limited=3)
    text = summary(good_log(missed=4), 1 / 30, motion, {"late_replies": 5})
    assert "warning: a limit changed 2 % of the targets" in text
    assert "warning: ticks are missed" in text
    assert "5 late replies on the bus" in text
    quiet = summary(good_log(missed=3), 1 / 30, MotionCounts(accepted=200, limited=2), {})
    assert "warning" not in quiet


def test_the_summary_of_a_run_that_never_began_is_no_error():
    assert "0 ticks of 33.3 ms" in summary(RunStatistics(), 1 / 30, MotionCounts(), {})


def test_a_line_a_second_tells_where_the_arm_is_and_every_tick_is_handed_on(capsys, monkeypatch):
    now = iter(np.arange(100.0, 102.99, 0.1))
    monkeypatch.setattr(lines_of_a_run, "time", SimpleNamespace(monotonic=lambda: next(now)))
    handed = []
    status = StatusLine(handed.append, ("pan", "lift"))
    for i in range(30):
        state = SimpleNamespace(position=np.array([i, -2.5]))
        status(Tick(i / 10, "run" if i < 20 else "stop", state, None, 7, 0, 0.0, 0.0, 0.0))
    assert len(handed) == 30
    command.said()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "   0.0 s  pan=    0.0 lift=   -2.5    7 actions left"
    assert len(lines) == 3
    assert lines[2].endswith("stop")


def test_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Gone())
    handed = []
    StatusLine(handed.append, ())(
        Tick(0.0, "run", SimpleNamespace(position=()), None, 0, 0, 0.0, 0.0, 0.0)
    )
    assert len(handed) == 1
