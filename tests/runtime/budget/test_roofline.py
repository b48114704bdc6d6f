"""Floors and projections against tables that another program computed; names of boards."""

from dataclasses import replace

import pytest

from smolvla_edge.runtime import InputError
from smolvla_edge.runtime.budget.roofline import (
    BOARDS,
    ONNX_ALONE,
    BoardPeaks,
    find_board,
    sustained_hz,
)
from smolvla_edge.runtime.bundle.manifest import Work
from support.full_size import FULL

INT8 = FULL.in_int8()
# Float vision, INT8 weights of the rest that are multiplied as FP16.
MIXED = replace(
    FULL,
    language=replace(FULL.language, weights=INT8.language.weights),
    expert=replace(FULL.expert, weights=INT8.expert.weights),
)

# performance.md 3.3: milliseconds for 1, 2 and 3 cameras at 100 % of the peaks in FP16, mixed and
# INT8, computed from the model's sizes alone; rounding and small layers may differ by 3 %.
FLOORS = {
    "Orin Nano 4GB": ((109, 153, 200), (78, 125, 171), (59, 85, 112)),
    "Orin Nano 4GB Super": ((71, 97, 125), (49, 78, 106), (38, 54, 70)),
    "Orin Nano 8GB": ((54.6, 76.5, 99.8), (39.0, 62.2, 85.5), (29.3, 42.4, 56.1)),
    "Orin Nano 8GB Super": ((35.2, 48.5, 62.7), (24.7, 38.9, 53.2), (18.9, 26.8, 35.2)),
    "Orin NX 8GB": ((39.5, 58.1, 77.0), (29.7, 48.6, 67.5), (21.4, 32.4, 43.5)),
    "Orin NX 16GB": ((36.6, 51.6, 67.4), (26.3, 42.1, 57.9), (19.7, 28.6, 37.9)),
    "Orin NX Super": ((33.5, 44.8, 57.0), (22.7, 35.1, 47.5), (17.9, 24.6, 31.8)),
    "AGX Orin 32GB": ((19.2, 27.9, 36.8), (14.2, 23.1, 32.0), (10.4, 15.5, 20.8)),
    "AGX Orin 64GB": ((16.2, 21.3, 26.7), (10.7, 16.3, 21.9), (8.6, 11.7, 14.9)),
    "Thor T4000": ((9.8, 11.3, 12.8), (5.7, 7.1, 8.6), (5.1, 6.0, 6.9)),
    "Thor T5000": ((9.2, 10.1, 10.9), (5.1, 5.9, 6.8), (4.7, 5.2, 5.8)),
}
# Of the best public run with a custom kernel for vision attention
VISION_PLUGIN = {
    "vision": 0.47,
    "language": 0.34,
    "memory": 0.52,
}
# performance.md 3.4b: FP16 at the efficiencies of the two best public runs, without and with it.
PROJECTIONS = {
    "Orin Nano 8GB Super": ((87, 132, 178), (71, 102, 133)),
    "Orin NX 16GB": ((92, 143, 193), (74, 109, 144)),
    "Orin NX Super": ((82, 120, 160), (67, 93, 120)),
    "AGX Orin 32GB": ((49, 78, 106), (39, 59, 78)),
    "AGX Orin 64GB": ((39, 56, 74), (32, 44, 56)),
    "Thor T5000": ((20, 23, 25), (18, 20, 22)),
}


def test_every_board_has_a_row():
    assert [board.name for board in BOARDS] == list(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_those_of_the_published_table(name):
    for chunk, row in zip((FULL, MIXED, INT8), FLOORS[name], strict=True):
        found = [sum(chunk.with_cameras(n).ms(find_board(name)).values()) for n in (1, 2, 3)]
        assert found == pytest.approx(row, rel=0.03)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_those_of_the_published_table(name):
    for efficiency, row in zip((ONNX_ALONE, VISION_PLUGIN), PROJECTIONS[name], strict=True):
        found = [
            sum(FULL.with_cameras(n).ms(find_board(name), **efficiency).values()) for n in (1, 2, 3)
        ]
        assert found == pytest.approx(row, rel=0.03)


def test_another_number_of_cameras_is_scaled_by_its_tokens():
    three = FULL.with_cameras(3)
    assert (three.cameras, three.prefix_tokens) == (3, 241)
    assert three.language.attention == pytest.approx(15 * 4 * 241**2 * 960)
    assert three.expert.attention == pytest.approx(
        4 * 50 * 960 * (8 * (241 + 50) + 8 * 241), rel=0.05
    )
    assert three.cache_bytes == pytest.approx(4.94e6, rel=0.01)
    assert three.expert.weights == FULL.expert.weights
    assert three.with_cameras(2) == FULL


def test_int8_counts_as_much_as_it_is_of_a_stage():
    half = {"float16": 60 * 10**9, "int8": 40 * 10**9}
    work = Work(half, 10 * 10**9, {"float16": 10, "int8": 30})
    chunk = replace(FULL, vision=work, language=work, expert=work, cache_bytes=8 * 10**6)
    board = BoardPeaks("toy", float_tflops=1.0, int8_tops=4.0, gb_s=1e-3, source="")
    assert work.weight_bytes == 50
    assert chunk.ms(board)["vision"] == pytest.approx(60 + 10 + 40 / 4)
    assert chunk.ms(board)["denoise"] == pytest.approx(10 * (8e6 + 50) / 1e3)
    assert chunk.ms(board, 0.5, 0.25)["language"] == pytest.approx(4 * chunk.ms(board)["vision"])


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("orin nano super", "Orin Nano 8GB Super"),
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            "Orin Nano 8GB Super",
        ),
        ("Jetson-Orin-Nano", "Orin Nano 8GB"),
        ("orin nx", "Orin NX 16GB"),
        ("Orin NX 16 GB Super", "Orin NX Super"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "AGX Orin 64GB"),
        ("agx_orin_32gb", "AGX Orin 32GB"),
        ("thor", "Thor T5000"),
        ("Jetson AGX Thor Developer Kit", "Thor T5000"),
    ],
)
def test_a_board_goes_by_what_people_call_it(typed, name):
    assert find_board(typed).name == name


@pytest.mark.parametrize(
    "typed", ["", "jetson nano", "nano", "xavier nx", "orin nano ultra", "orin"]
)
def test_an_unknown_board_lists_those_that_are_known(typed):
    with pytest.raises(
        InputError, match=r"is unknown, expected one of: Orin Nano 4GB, .*, Thor T5000$"
    ):
        find_board(typed)


def test_a_chunk_must_arrive_before_the_second_half_of_the_last_one_is_used_up():
    # Latency < n dt / 2: 500 ms at 50 Hz and 50 actions
    assert sustained_hz(50, 500.0) == pytest.approx(50)
