"""What the training statistics tell about units, and about where the arm stands."""

import numpy as np
import pytest

from smolvla_edge.runtime.bundle.normalization import Normalization
from smolvla_edge.runtime.robot.preflight import preflight, seen_range, units_evidence

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
# The extremes of an arm in use, in either unit; nothing else is known of it.
LOW, HIGH = [-40.0, -95.0, -30.0, -20.0, -50.0, 2.0], [35.0, 40.0, 97.0, 95.0, 45.0, 60.0]


def statistics(**values):
    return Normalization(
        "MEAN_STD", 1e-8, {name: tuple(map(float, v)) for name, v in values.items()}
    )


def with_joint(values, **changed):
    return [changed.get(name, value) for name, value in zip(JOINTS, values, strict=True)]


def extremes(low=(), high=()):
    return statistics(min=with_joint(LOW, **dict(low)), max=with_joint(HIGH, **dict(high)))


# (what the statistics are, the units they tell, a word of the reason)
EVIDENCE = {
    "a joint beyond 100 is in degrees": (
        extremes(high={"elbow_flex": 100.6}),
        "degrees",
        "elbow_flex reaches 100.6, which -100 to 100 cannot",
    ),
    "below -100 too": (
        extremes(low={"shoulder_lift": -104.2}),
        "degrees",
        "shoulder_lift reaches 104.2",
    ),
    "a joint from end to end is a percentage": (
        extremes(low={"wrist_flex": -100.0}, high={"wrist_flex": 99.6}),
        "range_m100_100",
        "wrist_flex ends at -100.0 and 99.6",
    ),
    "one end alone may be chance": (
        extremes(high={"wrist_flex": 100.0}),
        "",
        "fit degrees and -100 to 100 alike",
    ),
    "degrees win over ends": (
        extremes(low={"wrist_flex": -100.0}, high={"wrist_flex": 100.0, "wrist_roll": 160.0}),
        "degrees",
        "wrist_roll",
    ),
    "an ordinary arm fits either": (extremes(), "", "alike"),
    "small numbers are radians": (
        statistics(min=[-3.2, -1.8, -1.7, -1.6, -2.8, -0.1], max=[3.2, 1.8, 1.6, 1.7, 2.8, 1.7]),
        "other",
        "radians",
    ),
    "a gripper below 0": (
        extremes(low={"gripper": -1.1}),
        "other",
        "the gripper ranges from -1.1 to 60.0",
    ),
    "a gripper above 100": (extremes(high={"gripper": 101.5}), "other", "expected 0 to 100"),
    "a gripper that overshoots a little is none of it": (
        extremes({"gripper": -0.9}, {"gripper": 100.9}),
        "",
        "alike",
    ),
    "a mean beyond 100": (
        statistics(mean=[0, -101, 0, 0, 0, 20], std=[1] * 6),
        "degrees",
        "shoulder_lift reaches",
    ),
    "a spread that no percentage has": (
        statistics(mean=[0, -60, 0, 0, 0, 20], std=[20, 85, 9, 9, 9, 9]),
        "degrees",
        "shoulder_lift reaches 104.0",
    ),
    "a folded arm in percent, by mean and spread, is not taken for degrees": (
        statistics(mean=[0, -60, 70, 0, 0, 20], std=[20, 45, 40, 9, 9, 25]),
        "",
        "alike",
    ),
    "nor is its gripper taken for a broken one": (
        statistics(mean=[0, -60, 70, 0, 0, 50], std=[20, 45, 40, 9, 9, 49]),
        "",
        "alike",
    ),
    "radians by mean and spread": (
        statistics(mean=[0, -1, 1, 0, 0, 0.5], std=[1] * 6),
        "other",
        "radians",
    ),
    "extremes count where both are there": (
        statistics(min=LOW, max=HIGH, mean=[0.0] * 6, std=[60.0] * 6),
        "",
        "alike",
    ),
    "nothing at all": (statistics(), "", "no statistics"),
    "quantiles only": (statistics(q01=LOW, q99=HIGH), "", "no statistics"),
}


@pytest.mark.parametrize("name", EVIDENCE)
def test_units_are_told_from_the_statistics(name):
    given, units, words = EVIDENCE[name]
    seen, why = units_evidence((given,), JOINTS)
    assert seen == units
    assert words in why


def test_state_and_action_are_looked_at_together():
    ordinary, wide = extremes(), extremes(high={"wrist_roll": 170.0})
    for pair in ((ordinary, wide), (wide, ordinary), (statistics(), wide)):
        assert units_evidence(pair, JOINTS)[0] == "degrees"
    low, high = extremes(low={"wrist_flex": -100.0}), extremes(high={"wrist_flex": 100.0})
    for pair in ((low, high), (high, low)):
        assert units_evidence(pair, JOINTS)[0] == "range_m100_100"
    # A spread beyond 0 to 100 proves nothing
    moments = statistics(mean=[0] * 5 + [50], std=[20] * 5 + [49])
    assert units_evidence((ordinary, moments), JOINTS)[0] == ""


@pytest.mark.parametrize("widths", [(7, 7), (6, 7), (7, 6), (5, 5), (2, 14)])
def test_statistics_of_another_arm_are_not_of_these_units(widths):
    pair = [statistics(min=[-150.0] * n, max=[90.0] * n) for n in widths]
    seen, why = units_evidence(pair, JOINTS)
    assert seen == "other"
    assert f"{max(widths)} values, the arm has 6 joints" in why


def test_the_known_range_is_the_wider_of_extremes_and_five_deviations():
    both = statistics(min=[-10] * 6, max=[50] * 6, mean=[0] * 6, std=[4] * 6)
    low, high = seen_range(both)
    assert (low[0], high[0]) == (-20, 50)
    assert seen_range(statistics(q01=LOW, q99=HIGH)) is None


HOME = np.array([0.0, -90.0, 80.0, 60.0, 0.0, 10.0])
JUMP = np.array([60.0] * 5 + [np.inf])


def chunk_from(first):
    return np.float32(np.array(first) + np.linspace(0, 3, 5)[:, None])


def test_an_arm_where_the_policy_knows_it_has_no_problem_and_a_line_for_each_joint():
    table, problems = preflight(JOINTS, HOME, extremes(), chunk_from(HOME), JUMP)
    assert problems == []
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(JOINTS)
    assert lines[2].split() == [
        "shoulder_lift",
        "-90.0",
        "-95.0",
        "to",
        "40.0",
        "-90.0",
        "-90.0",
        "to",
        "-87.0",
    ]


def test_joints_far_outside_the_training_range_are_all_named():
    position = np.add(HOME, [0, -20, 30, 0, 0, 0])
    _, problems = preflight(JOINTS, position, extremes(), chunk_from(position), JUMP)
    assert problems == [
        "shoulder_lift stands at -110.0, training has seen -95.0 to 40.0",
        "elbow_flex stands at 110.0, training has seen -30.0 to 97.0",
    ]


def test_a_joint_that_never_moved_in_training_may_stand_a_little_elsewhere():
    still = statistics(min=HOME, max=HOME, mean=HOME, std=[0.0] * 6)
    assert preflight(JOINTS, HOME + 4.9, still, chunk_from(HOME), JUMP)[1] == []
    assert len(preflight(JOINTS, HOME - 5.1, still, chunk_from(HOME), JUMP)[1]) == 6


def test_a_position_that_is_no_number_is_no_place_to_start_from():
    _, problems = preflight(JOINTS, HOME * np.nan, extremes(), chunk_from(HOME), JUMP)
    assert len(problems) == 6


def test_a_first_target_too_far_away_is_named_and_the_gripper_may_go_anywhere():
    first = np.add(HOME, [0, 0, 0, -60.5, 59.5, 90])
    _, problems = preflight(JOINTS, HOME, extremes(), chunk_from(first), JUMP)
    assert problems == ["wrist_flex would go from 60.0 to -0.5, the limit is 60"]


def test_without_statistics_only_the_first_target_is_judged():
    table, problems = preflight(JOINTS, HOME * 50, statistics(), chunk_from(HOME * 50), JUMP)
    assert problems == []
    assert "not known" in table
