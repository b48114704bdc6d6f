"""The 30 ms question, for the full-size policy's counts."""

import json
from dataclasses import replace

import pytest

from smolvla_edge.runtime import Bundle, InputError
from smolvla_edge.runtime.budget.budget import boards_table, budget, chunk_of, report
from smolvla_edge.runtime.budget.roofline import BOARDS, find_board
from smolvla_edge.runtime.bundle.manifest import Tensor
from smolvla_edge.runtime.policy.policy import Timing
from support.full_size import FULL
from support.paths import ROOT

NANO, AGX, THOR = "orin nano super", "agx orin", "thor"


@pytest.fixture(scope="module")
def full(export_case):
    """The manifest of a full-size float16 bundle, 2 cameras."""
    m = Bundle.open(export_case("tiny", "fp32")).manifest
    mask, cache = (
        Tensor("prefix_mask", "bool", (1, 177)),
        Tensor("key.0", "float16", (1, 5, 177, 64)),
    )
    stages = {"vision": FULL.vision, "language": FULL.language}
    return replace(
        m,
        precision="fp16",
        prefix=replace(m.prefix, outputs=(mask, cache), stages=stages),
        expert=replace(m.expert, stages={"expert": FULL.expert}),
        cache_bytes=FULL.cache_bytes,
    )


def settings(found, kind):
    return [(o.cameras, o.steps, o.int8) for o in found.options[kind]]


def test_a_chunk_is_read_from_the_manifest(full, export_case):
    assert chunk_of(full) == FULL
    variant = Bundle.open(export_case("tiny_variant", "fp32")).manifest  # one camera
    found = chunk_of(variant)
    assert found.prefix_tokens - found.image_tokens == variant.tokens.length + 1
    assert found.vision.flops + found.language.flops == variant.prefix.flops


def test_a_small_board_is_ruled_out_and_told_what_the_floor_would_allow(full):
    text, found = report(full, NANO)
    assert json.loads(json.dumps(found))["board"]["name"] == "Orin Nano 8GB Super"
    assert "30 ms     floor 48.7 ms: ruled out" in text
    assert "30 ms     projected 132.8 ms: not met" in text
    assert "options   floor: 2 cameras, 10 steps, INT8 (26.9) or 1 camera, 5 steps (25.6)\n" in text
    assert "options   projected: none\n" in text
    assert "sustain 514 Hz floor, 188 Hz projected; 30 Hz needs 833 ms" in text
    assert "measured 1" not in text


def test_options_are_the_smallest_changes_that_do(full):
    found = budget(full, find_board(AGX))
    assert settings(found, "floor") == [(2, 10, False)]
    assert settings(found, "projected") == [(2, 5, True), (1, 10, True), (1, 5, False)]
    assert all(o.ms["projected"] <= 30 for o in found.options["projected"])


def test_an_int8_bundle_is_not_offered_int8(full):
    stages = {name: getattr(FULL.in_int8(), name) for name in ("vision", "language", "expert")}
    expert = replace(full.expert, stages={"expert": stages.pop("expert")})
    int8 = replace(
        full, precision="int8", prefix=replace(full.prefix, stages=stages), expert=expert
    )
    assert budget(int8, find_board(NANO)).stages["chunk"]["floor"] == pytest.approx(26.8, rel=0.03)
    assert settings(budget(int8, find_board(AGX)), "projected") == [(2, 5, True), (1, 10, True)]


def test_a_float32_bundle_is_counted_as_its_export_for_a_gpu(full, export_case):
    m = Bundle.open(export_case("tiny", "fp32")).manifest
    found = budget(m, find_board(NANO))
    assert "float32 is counted as float16" in found.bundle
    assert "float32" not in budget(full, find_board(NANO)).bundle
    halved = (m.expert.stages["expert"].weight_bytes + m.cache_bytes) / 2
    assert found.stages["denoise"]["floor"] == pytest.approx(10 * halved / 102e6)


def test_what_was_measured_stands_apart(full):
    text, found = report(full, THOR, Timing(2.0, 20.0, 15.0))
    chunk = found["stages"]["chunk"]
    assert (chunk["measured"], found["verdicts"]) == (
        37.0,
        {"floor": "not ruled out", "projected": "met", "measured": "not met"},
    )
    assert found["stages"]["vision"].keys() == {"floor", "projected"}
    assert "options   projected: as it is\n" in text
    assert "676 Hz measured" in text


def test_every_board_is_told_where_none_is_named(full):
    text, found = report(full, None)
    assert text == boards_table(full)
    assert [row["board"]["name"] for row in found["boards"]] == [board.name for board in BOARDS]
    assert "| Orin Nano 8GB Super | 48.7 | 132.8 | not met | none | 188 Hz |" in text.splitlines()
    with pytest.raises(InputError, match="board 'pi' is unknown"):
        report(full, "pi")


def test_the_page_shows_the_table_of_the_full_size_policy(full):
    assert boards_table(full) in (ROOT / "docs" / "budget.md").read_text()


def test_the_datasets_rate_is_the_one_to_sustain(full):
    assert budget(replace(full, fps=50.0), BOARDS[0]).control_hz == 50.0
