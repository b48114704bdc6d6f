"""Result files: what is not one is refused."""

import json

import pytest

from smolvla_edge.benchmarks.result import read
from smolvla_edge.core.errors import ResultError
from support.paths import DATA, ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")))
def test_the_results_of_this_project_can_be_read(path):
    assert read(path).machine.cores > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r | {"version": 1}, r"is version 1, expected 3: measure again"),
        (lambda r: r | {"format": "other"}, r"is not a result of smolvla-bench"),
        (lambda r: [r], r"is not a result of smolvla-bench"),
        (lambda r: r | {"kind": []}, r"is of kind \[\], expected"),
        (lambda r: r | {"kind": "speed"}, r"'speed', expected latency, accuracy, frontier, contr"),
        (lambda r: r | {"loops": 3, "more": 1}, r"not valid: unknown field more; loops is 3"),
    ],
)
def test_a_result_that_is_none_is_refused(tmp_path, change, said):
    whole = json.loads((DATA / "results" / "control.json").read_text())
    path = tmp_path / "result.json"
    path.write_text(json.dumps(change(whole)))
    with pytest.raises(ResultError, match=said):
        read(path)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "result.json").write_text("{")
    for name in ("result.json", "nothing.json"):
        with pytest.raises(ResultError, match="cannot read"):
            read(tmp_path / name)
