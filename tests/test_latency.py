"""The latency benchmark runs; its numbers are never tested."""

import json

import pytest
from conftest import DATA
from typer.testing import CliRunner

from smolvla_edge.benchmarks.latency import app, interleaved
from smolvla_edge.benchmarks.lerobot_process import LeRobotProcess
from smolvla_edge.export.errors import ExportError

CHECKPOINT = str(DATA / "tiny" / "checkpoint")


def test_every_bundle_is_compared_with_the_checkpoint_and_the_last_line_is_json(export_case):
    bundles = [str(export_case("tiny", "fp32", target)) for target in ("portable", "cpu")]
    options = [word for bundle in bundles for word in ("--bundle", bundle)]
    done = CliRunner().invoke(app, [CHECKPOINT, *options, "--repeats", "2", "--warmup", "1"])
    assert done.exit_code == 0, done.output
    seconds = json.loads(done.output.splitlines()[-1])["seconds"]
    assert list(seconds) == ["torch views float32", *bundles]
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    assert f"{bundles[1]} is faster than torch views float32 by" in done.output


def test_runs_are_taken_in_turns_and_the_first_are_thrown_away():
    log, clock = [], iter(range(100))

    def run(name):
        return lambda: log.append(name) or float(next(clock))

    assert interleaved([run("a"), run("b")], repeats=2, warmup=1).tolist() == [[2.0, 4.0], [3.0, 5.0]]
    assert log == ["a", "b"] * 3


def test_a_bundle_of_other_weights_is_not_compared(export_case):
    other = str(DATA / "tiny_outliers" / "checkpoint")
    done = CliRunner().invoke(app, [other, "--bundle", str(export_case("tiny", "fp32"))])
    assert "exported from other weights" in str(done.exception)


def test_a_python_without_lerobot_is_reported():
    with pytest.raises(ExportError, match=r"ended with status 1.*needs lerobot"):
        LeRobotProcess("/bin/false", CHECKPOINT, "float32")
