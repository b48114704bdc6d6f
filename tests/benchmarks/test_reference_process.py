"""The checkpoint in PyTorch in a process of its own, as smolvla-bench latency starts it."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from smolvla_edge.benchmarks import reference_process
from smolvla_edge.benchmarks.latency import ReferenceOptions
from smolvla_edge.benchmarks.reference_process import ReferenceProcess
from smolvla_edge.core.errors import BenchError
from smolvla_edge.export.checkpoint.checkpoint import load_checkpoint
from smolvla_edge.export.reference_process import ReferenceRequest, observation, serve_views
from smolvla_edge.runtime import Bundle, Policy
from smolvla_edge.runtime.policy.selfcheck import error
from support.paths import DATA

CHECKPOINT = str(DATA / "tiny" / "checkpoint")


def test_the_torch_views_compute_what_the_bundle_does(export_case):
    bundle = Bundle.open(export_case("tiny", "fp32"))
    asked = ReferenceRequest("views", CHECKPOINT, None, str(bundle.folder), "float32", "cpu", False)
    chunk, tokens, _ = serve_views(asked, load_checkpoint(CHECKPOINT), bundle, ExitStack())
    assert tokens == bundle.manifest.tokens.length
    assert error(chunk(), Policy.load(bundle, "cpu").predict_chunk(*observation(bundle))) < 1e-5


def test_lerobot_is_asked_for_dtype_device_and_compilation(export_case, tmp_path):
    bundle = Bundle.open(export_case("tiny", "fp32"))
    options = ReferenceOptions(CHECKPOINT, None, str(tmp_path / "python"), compiled=True)
    python, asked, said = options.processes(bundle, "cuda")
    assert [a.name for a in asked] == [
        "LeRobot float32",
        "LeRobot bfloat16",
        "LeRobot float32 compiled",
        "LeRobot bfloat16 compiled",
    ]
    assert said.startswith("LeRobot, in processes")
    script = (
        f'#!/bin/sh\necho "$3" > {tmp_path}/asked\necho loading\n'
        "echo 'smolvla-bench [[], 48, \"4.4\"]'\nread line; echo smolvla-bench 1.5\n"
    )
    Path(python).write_text(script)
    Path(python).chmod(0o755)
    with ReferenceProcess(python, asked[3]) as process:
        assert (process.differences, process.tokens, process.note) == ([], 48, "4.4")
        assert process.run() == 1.5
    Path(python).write_text(script.replace("smolvla-bench 1.5", "smolvla-bench []"))
    with (
        ReferenceProcess(python, asked[3]) as process,
        pytest.raises(BenchError, match=r"answers a chunk with \[\]"),
    ):
        process.run()
    got = json.loads((tmp_path / "asked").read_text())
    assert (got["dtype"], got["device"], got["compiled"]) == ("bfloat16", "cuda", True)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "status 1.*make lerobot-env"),
        ("echo smolvla-bench rubbish", r"answers 'smolvla-bench rubbish"),
        ("echo 'smolvla-bench [1, 2]'", r"answers \[1, 2\]"),
        ("""echo 'smolvla-bench "no lerobot"'""", "^no lerobot$"),
        ("printf '\\377\\376\\n'", "status 0"),
        ("sleep 60", "was not ready after 0 s"),
    ],
)
def test_a_python_that_is_none_or_has_no_lerobot_is_reported(tmp_path, monkeypatch, script, said):
    monkeypatch.setattr(reference_process, "START_LIMIT_S", 0.3 if "sleep" in script else 60)
    python = tmp_path / "python"
    asked = ReferenceRequest("lerobot", CHECKPOINT, None, "", "float32", "cpu", False)
    with pytest.raises(BenchError, match="cannot be started"):
        ReferenceProcess(str(python), asked)
    start = "exec " if "sleep" in script else ""
    python.write_text(f"#!/bin/sh\n{start}{script}\n")
    python.chmod(0o755)
    with pytest.raises(BenchError, match=said):
        ReferenceProcess(str(python), asked)
