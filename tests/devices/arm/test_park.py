"""The way back to rest: smooth, in at most five seconds, and no faster than a person expects."""

import numpy as np
import pytest

from smolvla_edge.devices.arm.limits import TICKS_PER_DEG
from smolvla_edge.devices.arm.park import Park

REST = np.array([2000.0, 1000, 3000, 2000, 500, 2100])
FAST = np.full(6, 1e4)


def moves(park, start_s, steps=2000):
    times = np.linspace(start_s, park.end_s, steps)
    return np.array([park.goal(t) for t in times]), times


@pytest.mark.parametrize("away_deg", [0.1, 10, 90, 150])
def test_it_leads_smoothly_from_the_last_goal_to_rest(away_deg):
    start = REST + away_deg * TICKS_PER_DEG * np.array([1, -0.5, 0, 0.2, 0, -1])
    park = Park(start, REST, 50.0, FAST)
    goals, times = moves(park, 50.0)
    assert np.array_equal(goals[0], start) and np.array_equal(goals[-1], REST)
    assert np.array_equal(park.goal(park.end_s + 10), REST)
    speed = np.abs(np.gradient(goals, times, axis=0)) / TICKS_PER_DEG
    assert speed.max() == pytest.approx(60, rel=0.01)
    assert speed[[0, -1]].max() < 1  # it starts and ends at rest
    left = np.abs(goals - REST)
    assert np.all(np.diff(left, axis=0) <= 1e-6)  # never back
    # All joints are on their way for the same time: the arm moves along a line.
    assert np.allclose(left[:, 0] * 0.5, left[:, 1])
    assert park.duration_s < 5 and park.end_s == 50.0 + park.duration_s


def test_it_never_takes_longer_than_five_seconds():
    assert Park(REST + 330 * TICKS_PER_DEG, REST, 0.0, FAST).duration_s == 5.0


def test_where_goals_must_be_slower_it_takes_longer_and_arrives():
    limit = np.full(6, 10 * TICKS_PER_DEG)
    park = Park(REST + 90 * TICKS_PER_DEG, REST, 0.0, limit)
    goals, times = moves(park, 0.0)
    assert np.abs(np.gradient(goals, times, axis=0)).max() <= limit[0] * 1.01


def test_an_arm_at_rest_is_parked_at_once():
    park = Park(REST, REST, 7.0, FAST)
    assert park.duration_s == 0 and np.array_equal(park.goal(7.0), REST)
