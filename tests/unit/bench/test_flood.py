"""The benchmark of a flood reads quantiles out of histograms."""

from __future__ import annotations

import math

import pytest

from tests.bench.flood import percentile, quantile

BEFORE = {0.01: 5.0, 0.1: 7.0, math.inf: 7.0}


def test_a_quantile_is_of_what_came_between_two_readings() -> None:
    after = {0.01: 55.0, 0.1: 107.0, math.inf: 107.0}  # 50 below 0.01, 50 from there to 0.1
    assert quantile(BEFORE, after, 0.5) == pytest.approx(0.01)
    assert quantile(BEFORE, after, 0.75) == pytest.approx(0.055)
    assert quantile(BEFORE, after, 1.0) == pytest.approx(0.1)


def test_beyond_the_last_bound_it_is_that_bound() -> None:
    assert quantile(BEFORE, {0.01: 5.0, 0.1: 7.0, math.inf: 9.0}, 0.99) == 0.1


def test_nothing_is_longer_than_anything() -> None:
    assert quantile(BEFORE, BEFORE, 0.99) == math.inf
    assert percentile([], 0.99) == math.inf


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
