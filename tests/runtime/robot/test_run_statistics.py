"""Percentiles from a histogram of bounded size."""

import numpy as np
import pytest

from smolvla_edge.runtime.robot.run_statistics import Distribution, RunStatistics


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(1).lognormal(0, 2, 20_000),
        np.random.default_rng(2).uniform(0.01, 3, 20_000),
        np.r_[np.full(990, 0.2), np.full(10, 900.0)],
    ],
    ids=["lognormal", "uniform", "two values"],
)
def test_percentiles_are_within_half_a_percent_of_the_exact_ones(values):
    measured = Distribution(values)
    for percent in (0, 5, 50, 95, 99, 100):
        exact = np.percentile(values, percent)
        assert measured.percentile(percent) == pytest.approx(exact, rel=0.006)
    assert (measured.min, measured.max, len(measured)) == (min(values), max(values), len(values))


def test_few_values_and_zeros():
    assert Distribution([3.0, 9.0]).percentile(50) == pytest.approx(6.0, rel=0.005)
    assert Distribution([7.5]).percentile(99) == 7.5
    assert Distribution([0.0, 0.0]).percentile(50) == 0.0
    assert not Distribution()


def test_its_size_does_not_grow_with_the_number_of_values():
    measured = Distribution(np.random.default_rng(1).lognormal(0, 3, 100_000))
    assert len(measured._bins) < 3000
    assert measured.values is None


def test_a_benchmark_can_keep_every_value():
    statistics = RunStatistics.keeping_values()
    statistics.queued.add(3)
    assert (statistics.queued.values, statistics.read_ms.values) == ([3], [])
