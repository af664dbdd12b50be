"""Statistics on timings whose truth is known."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from controlrt.perf.statistics import (
    Bootstrap,
    Ratio,
    Verdict,
    joint_confidence,
    percentile,
    percentiles,
    verdict,
)

SECONDS = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=40)


@given(SECONDS, st.floats(0, 100))
def test_percentiles_are_numpys(samples: list[float], percent: float) -> None:
    assert percentile(samples, percent) == pytest.approx(np.percentile(samples, percent), rel=1e-9)
    assert min(samples) <= percentile(samples, percent) <= max(samples)


def test_percentiles_are_pythons() -> None:
    samples = np.random.default_rng(0).gamma(2, 1, 101).tolist()
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    found = percentiles(samples)
    assert (found.p50, found.p90, found.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]))


def test_percentiles_by_hand() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([10, 20, 30], 90) == 28
    assert percentile([7], 99) == 7
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_the_interval_of_a_median_is_scipys() -> None:
    samples = np.random.default_rng(1).gamma(2, 1, 15)
    expected = scipy.stats.bootstrap(
        (samples,), np.median, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    found = Bootstrap().median(samples).ratio()
    assert found.value == pytest.approx(np.median(samples), abs=1e-4)
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=0.02)


@pytest.mark.parametrize("rounds", [5, 10])
def test_intervals_of_a_ratio_cover_the_truth_as_often_as_they_say(rounds: int) -> None:
    """Skewed noise, as timings have; 200 trials, so 92% leaves room for two standard deviations of chance."""
    rng = np.random.default_rng(rounds)
    covered = 0
    for _ in range(200):
        slow, fast = (seconds * (1 + 0.05 * rng.gamma(1.5, 1, rounds)) for seconds in (3.0, 2.0))
        bootstrap = Bootstrap()
        found = (bootstrap.median(slow) / bootstrap.median(fast)).ratio()
        covered += found.low <= 1.5 <= found.high
    assert covered / 200 >= 0.92


def test_what_did_not_change_is_seldom_called_slower() -> None:
    """At most 2.5%, with no threshold to help; 200 trials."""
    rng = np.random.default_rng(0)
    slower = 0
    for _ in range(200):
        bootstrap = Bootstrap()
        found = bootstrap.median(rng.normal(1, 0.05, 10)) / bootstrap.median(rng.normal(1, 0.05, 10))
        slower += verdict(found.ratio(), 0) == "slower"
    assert slower / 200 <= 0.04


def test_the_same_calls_draw_the_same() -> None:
    samples = [1.0, 1.1, 1.3, 0.9, 1.2]
    first, second = (Bootstrap().median(samples).ratio() for _ in range(2))
    assert first == second
    bootstrap = Bootstrap()
    itself = bootstrap.median(samples) / bootstrap.median(samples)
    assert itself.ratio().low < 1 < itself.ratio().high  # two draws, not one


@pytest.mark.parametrize(
    ("low", "value", "high", "expected"),
    [
        (1.02, 1.05, 1.08, "slower"),
        (0.90, 0.93, 0.96, "faster"),
        (0.98, 1.00, 1.02, "same"),
        (1.01, 1.02, 1.03, "same"),
        (1.01, 1.02, 1.04, "cannot tell"),
        (0.99, 1.05, 1.10, "cannot tell"),
        (0.80, 1.00, 1.20, "cannot tell"),
        (0.90, 0.95, 1.01, "cannot tell"),
    ],
)
def test_verdicts(low: float, value: float, high: float, expected: Verdict) -> None:
    assert verdict(Ratio(value=value, low=low, high=high), 0.03) == expected


def test_many_intervals_hold_together() -> None:
    assert joint_confidence(1) == 0.95
    assert joint_confidence(10) == pytest.approx(0.995)
