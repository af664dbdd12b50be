"""Thresholds against what NumPy, a plain loop, brute force and closed forms say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from controlrt.compiler.quantization.arithmetic import FP8, INT8, NumberFormat, dequantize, quantize, scales_of
from controlrt.compiler.quantization.histogram import Histogram
from controlrt.compiler.quantization.statistics import BINS, BUCKETS, LayerStatistics
from controlrt.compiler.quantization.thresholds import (
    METHODS,
    amax_of,
    entropy,
    expected_error,
    least_squares,
    methods_of,
    percentile,
)
from controlrt.runtime.errors import UserError

COUNTS = hnp.arrays(np.int64, 32, elements=st.one_of(st.just(0), st.integers(0, 1000))).filter(np.any)


def layer_of(values: NDArray[np.float32]) -> LayerStatistics:
    """What is seen of (buckets, n) values, all of them sampled."""
    histogram = Histogram()
    for bucket, each in enumerate(values):
        histogram.add(bucket, each)
    amax = np.abs(values).max(axis=1)
    return LayerStatistics(
        channel_amax=amax.max(keepdims=True), bucket_amax=amax, histogram=histogram.counts, limit=histogram.limit
    )


def relative_error(values: NDArray[np.float32], amax: float, number_format: NumberFormat = INT8) -> NDArray[np.float64]:
    """(buckets,): mean square of what is lost, relative to the mean square of the values."""
    scale = scales_of(amax, number_format.largest)
    lost = dequantize(quantize(values, scale, number_format=number_format), scale).astype(np.float64) - values
    return np.asarray((lost**2).mean(axis=1) / (values.astype(np.float64) ** 2).mean(axis=1))


def drifting(distribution: str, seed: int = 0, size: int = 5_000) -> NDArray[np.float32]:
    """(BUCKETS, size): timesteps with eight times the spread of others."""
    random = np.random.default_rng(seed)
    draw = {
        "normal": random.standard_normal,
        "laplace": lambda shape: random.laplace(size=shape),
        "uniform": lambda shape: random.uniform(-1, 1, shape),
        "student": lambda shape: random.standard_t(3, shape),
        "rectified": lambda shape: np.maximum(random.standard_normal(shape), 0),
    }[distribution]
    return (draw((BUCKETS, size)) * np.geomspace(0.3, 2.4, BUCKETS)[:, None]).astype(np.float32)


# minmax and percentile


@given(st.integers(0, 2**32 - 1), st.sampled_from(["99.9", "99.99", "99.999"]))
@settings(max_examples=20)
def test_percentiles_are_numpy_s_but_for_a_bin(seed: int, percent: str) -> None:
    values = drifting("student", seed)
    layer = layer_of(values)
    width, share = layer.limit / BINS, float(percent) / 100
    low, high = np.quantile(np.abs(values), (share - 1e-9, share + 1e-9), method="inverted_cdf")
    assert low - width <= amax_of(layer, f"percentile:{percent}") <= high + width


@given(COUNTS, st.floats(1, 100))
def test_percentiles_within_bins(counts: NDArray[np.int64], percent: float) -> None:
    at = percentile(counts, percent)
    whole = math.floor(at)
    below = counts[:whole].sum() + (at - whole) * (counts[whole] if whole < counts.size else 0)
    assert below == pytest.approx(percent / 100 * counts.sum(), rel=1e-9)


def test_minmax_is_exact_whatever_was_sampled() -> None:
    layer = layer_of(drifting("normal"))
    wider = LayerStatistics(
        channel_amax=np.array([3, 77, 1], np.float32),
        bucket_amax=layer.bucket_amax,
        histogram=layer.histogram,
        limit=layer.limit,
    )
    assert amax_of(wider, "minmax") == 77


# entropy


def naive_divergence(counts: NDArray[np.int64], size: int, levels: int) -> float:
    """Of the slides of Migacz 2017, bin by bin."""
    kept = counts[:size].astype(float)
    reference = kept.copy()
    reference[-1] += counts[size:].sum()
    candidate = np.zeros(size)
    for start, end in itertools.pairwise(size * level // levels for level in range(levels + 1)):
        filled = [place for place in range(start, end) if reference[place] > 0]
        for place in filled:
            candidate[place] = kept[start:end].sum() / len(filled)
    if not candidate.any():
        return math.inf
    p, q = reference / reference.sum(), np.maximum(candidate, 1e-4) / candidate.sum()
    return sum(p[place] * math.log(p[place] / q[place]) for place in range(size) if p[place] > 0)


@given(COUNTS)
def test_entropy_is_that_of_a_plain_loop(counts: NDArray[np.int64]) -> None:
    divergences = {size: naive_divergence(counts, size, 8) for size in range(8, counts.size + 1)}
    found = entropy(counts, levels=8)
    assert divergences[int(found)] <= min(divergences.values()) + 1e-9


def test_entropy_of_a_uniform_distribution_cuts_nothing() -> None:
    assert entropy(np.full(BINS, 1000)) == BINS


def test_entropy_of_few_bins_cuts_nothing() -> None:
    assert entropy(np.full(128, 3)) == 128


# mse


@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform", "student", "rectified"])
@pytest.mark.parametrize("outlier", [None, 60.0])
@pytest.mark.parametrize("number_format", [INT8, FP8], ids=["int8", "fp8"])
def test_mse_is_as_good_as_brute_force(distribution: str, outlier: float | None, number_format: NumberFormat) -> None:
    values = drifting(distribution)
    if outlier is not None:
        values[3, 0] = outlier
    layer = layer_of(values)
    tried = [relative_error(values, amax, number_format).sum() for amax in np.geomspace(0.02, 1, 80) * layer.amax]
    found = amax_of(layer, "mse", number_format)
    error = relative_error(values, found, number_format)
    assert error.sum() <= 1.03 * min(tried)
    if distribution != "rectified":  # half of that are zeros, which are exact, and not spread over their bin
        assert expected_error(layer, found, number_format) == pytest.approx(np.sqrt(error.mean()), rel=0.03)


@pytest.mark.parametrize(("name", "paper"), [("norm", 3.92), ("laplace", 9.89)])
def test_mse_is_the_optimum_of_known_distributions(name: str, paper: float) -> None:
    """The clipping values are those of Banner et al. 2019, arXiv 1810.05723, for 8 bits."""
    distribution = getattr(scipy.stats, name)
    edges = np.linspace(0, 20, BINS + 1)
    histogram = np.diff(distribution.cdf(edges) * 1e12).astype(np.int64)[None]

    def error(threshold: float) -> float:
        cut, _ = scipy.integrate.quad(lambda x: (x - threshold) ** 2 * distribution.pdf(x), threshold, np.inf)
        return (threshold / 127) ** 2 / 12 + 2 * cut

    optimum = scipy.optimize.minimize_scalar(error, bounds=(1, 20), method="bounded").x
    found = least_squares(histogram) * edges[1]
    assert found == pytest.approx(optimum, rel=0.015)
    assert found == pytest.approx(paper, rel=0.02)


def test_mse_of_a_uniform_distribution_cuts_a_third_of_a_percent() -> None:
    # t^2 / (12 * 127^2) + (1 - t)^3 / 3 is least where t / (6 * 127^2) = (1 - t)^2.
    assert least_squares(np.full((1, BINS), 1000)) / BINS == pytest.approx(0.9968, abs=0.01)


@given(hnp.arrays(np.int64, (3, 64), elements=st.integers(0, 1000)).filter(np.any), st.integers(1, 50))
def test_no_timestep_counts_more_for_being_sampled_more(histogram: NDArray[np.int64], times: int) -> None:
    more = histogram * np.array([[1], [times], [1]])
    assert least_squares(more) == pytest.approx(least_squares(histogram), rel=1e-9)


def test_loud_timesteps_do_not_ruin_quiet_ones() -> None:
    values = drifting("laplace")
    values[-1] *= 4
    layer = layer_of(values)
    quiet, loud = slice(0, -1), slice(-1, None)
    with_all, alone = relative_error(values, layer.amax), relative_error(values, amax_of(layer, "mse"))
    pooled = least_squares(layer.histogram.sum(axis=0, keepdims=True)) * layer.limit / BINS
    assert alone[quiet].max() < with_all[quiet].max() / 4
    assert alone[quiet].max() < relative_error(values, pooled)[quiet].max()
    assert alone[loud].max() < 0.1


# All of them


def test_outliers_ruin_minmax_alone() -> None:
    values = np.random.default_rng(0).standard_normal((BUCKETS, 50_000)).astype(np.float32)
    values[4, 7] = 300
    layer, most = layer_of(values), np.delete(values, 4, axis=0)
    errors = {method: relative_error(most, amax_of(layer, method)).max() for method in METHODS}
    assert errors.pop("minmax") > 0.2
    assert max(errors.values()) < 0.03
    assert errors["percentile:99.9"] < 1e-3


@given(st.integers(0, 1000), st.integers(-20, 20), st.sampled_from(METHODS))
@settings(max_examples=30)
def test_thresholds_scale_with_the_values(seed: int, power: int, method: str) -> None:
    values = drifting("laplace", seed, size=500)
    amax = amax_of(layer_of(values), method)
    assert 0 < amax <= np.abs(values).max()
    assert amax_of(layer_of(values * np.float32(2.0**power)), method) == pytest.approx(amax * 2.0**power, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_nothing(method: str) -> None:
    assert amax_of(layer_of(np.zeros((BUCKETS, 10), np.float32)), method) == 0
    unsampled = LayerStatistics(
        channel_amax=np.array([5], np.float32),
        bucket_amax=np.zeros(BUCKETS, np.float32),
        histogram=np.zeros((BUCKETS, BINS), np.int64),
        limit=0.0,
    )
    assert amax_of(unsampled, method) == 5
    assert expected_error(unsampled, 5.0, INT8) == 0


def test_unknown_methods_are_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"no calibration method 'percentile:42' for int8; there are: mse, minmax, percentile:99\.9,"
    ):
        amax_of(layer_of(drifting("normal")), "percentile:42")
    assert methods_of(INT8) == METHODS
    with pytest.raises(
        UserError, match=r"no calibration method 'entropy' for fp8; there are: mse, minmax, percentile.*99\.999$"
    ):
        amax_of(layer_of(drifting("normal")), "entropy", FP8)


def test_in_fp8_outliers_ruin_nothing() -> None:
    """Steps are relative, so most values keep as many digits below an outlier as without it."""
    values = np.random.default_rng(0).standard_normal((BUCKETS, 50_000)).astype(np.float32)
    expected = relative_error(values, float(np.abs(values).max()), FP8)
    values[4, 7] = 300
    others = np.arange(BUCKETS) != 4
    found = relative_error(values, amax_of(layer_of(values), "minmax", FP8), FP8)
    np.testing.assert_allclose(found[others], expected[others], rtol=0.1)
