"""Where to clip a layer's input: the magnitude that becomes the largest number, 127 of int8 or 448 of fp8.

In int8 a low threshold makes small steps and cuts large values off; a high one keeps them and rounds all others
coarsely. In fp8 steps are relative, so a high threshold costs little: what lies below 2^-15 of it becomes subnormal.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.compiler.quantization.arithmetic import FP8, INT8, LEVELS, NumberFormat
from controlrt.compiler.quantization.statistics import LayerStatistics
from controlrt.runtime.errors import UserError

PERCENTILES = ("99.9", "99.99", "99.999")
METHODS = ("mse", "minmax", *(f"percentile:{percent}" for percent in PERCENTILES), "entropy")
DEFAULT_METHODS = {INT8.name: "mse", FP8.name: "minmax"}
"""By format; ``docs/int8.md`` has what each gives."""
_CANDIDATES = 512
"""Thresholds that ``mse`` tries, each 1.4% above the one before."""
_LITTLE = 1e-4
"""Of one value."""


def methods_of(number_format: NumberFormat) -> tuple[str, ...]:
    """The methods that there are for a format; ``entropy`` is for levels that are evenly spaced, as int8's are."""
    return tuple(method for method in METHODS if number_format is INT8 or method != "entropy")


def amax_of(layer: LayerStatistics, method: str, number_format: NumberFormat = INT8) -> float:
    """The threshold of a layer's input, no larger than the largest magnitude seen; 0 where all of it was 0.

    Args:
        layer: what was seen.
        method: ``minmax``, the largest magnitude; ``percentile:P``, which ``P`` percent of all values do not pass;
            ``entropy``, see :func:`entropy`; ``mse``, see :func:`least_squares`.
        number_format: what the input becomes.

    Raises:
        UserError: there is no such method.
    """
    methods = methods_of(number_format)
    if method not in methods:
        raise UserError(
            f"there is no calibration method {method!r} for {number_format.name}; there are: {', '.join(methods)}"
        )
    name, _, percent = method.partition(":")
    if name == "minmax" or not layer.histogram.any():
        return layer.amax
    if name == "percentile":
        bins = percentile(layer.histogram.sum(axis=0), float(percent))
    else:
        total = layer.histogram.sum(axis=0)
        bins = entropy(total) if name == "entropy" else least_squares(layer.histogram, number_format)
    return float(min(bins * layer.limit / layer.histogram.shape[1], layer.amax))


def percentile(counts: NDArray[np.int64], percent: float) -> float:
    """What ``percent`` of the values do not pass, evenly spread within their bins.

    Args:
        counts: (bins,)
        percent: from 0 to 100.

    Returns:
        In bins.
    """
    below = np.concatenate([[0], np.cumsum(counts)])
    wanted = percent / 100 * below[-1]
    last = max(int(np.searchsorted(below, wanted)) - 1, 0)
    return float(last + (wanted - below[last]) / max(counts[last], 1))


def entropy(counts: NDArray[np.int64], levels: int = LEVELS + 1) -> float:
    """The threshold that loses the least information: Migacz 2017, "8-bit inference with TensorRT", GTC.

    For every number ``i`` of bins, from ``levels`` on, P is the first ``i`` bins, with all that is cut off added to the
    last of them, and Q is the same bins without that, joined to ``levels``, each spread evenly over those of its bins
    that are not empty in P. The divergence ``KL(P || Q)`` is least at the threshold, which is so never below ``levels``
    bins. Where Q's last bin is empty and P's is not, the divergence would be infinite, and lone outliers would always
    be kept; so Q has a little there, as in Apache MXNet.

    Args:
        counts: (bins,)
        levels: magnitudes that int8 can tell apart.

    Returns:
        In bins.
    """
    bins = counts.size
    if bins <= levels:
        return float(bins)
    sizes = np.arange(levels, bins + 1)
    kept = np.concatenate([[0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    total = kept[-1]
    # (sizes, levels + 1): the ends of the levels, in bins.
    ends = sizes[:, None] * np.arange(levels + 1) // levels
    mass, spread = np.diff(kept[ends], axis=1), np.diff(filled[ends], axis=1)
    last, outliers = counts[sizes - 1], total - kept[sizes]
    spread[:, -1] += (last == 0) & (outliers > 0)
    # With P and Q as counts, KL(P || Q) = (sum P log P - sum P log Q) / |P| - log |P| + log |Q|.
    p_log_p = (
        np.cumsum(_x_log_y(counts, counts))[sizes - 1]
        - _x_log_y(last, last)
        + _x_log_y(last + outliers, last + outliers)
    )
    p_log_q = _x_log_y(mass, mass / np.maximum(spread, 1)).sum(axis=1)
    p_log_q += _x_log_y(outliers, np.maximum(mass[:, -1] / np.maximum(spread[:, -1], 1), _LITTLE))
    divergence = (p_log_p - p_log_q) / total + np.log(np.maximum(kept[sizes], 1) / total)
    divergence[kept[sizes] == 0] = np.inf
    return float(sizes[divergence.argmin()])


def least_squares(histogram: NDArray[np.int64], number_format: NumberFormat = INT8) -> float:
    """The threshold of the least squared error, at all timesteps alike.

    Activations drift as the noise goes. What is least is the sum over intervals of timesteps of the expected squared
    error, divided by the mean square there, so that large values at some timesteps do not ruin small ones at others.

    Args:
        histogram: (buckets, bins); buckets of nothing do not count.
        number_format: what the values become.

    Returns:
        In bins.
    """
    thresholds, errors = _candidates(histogram.shape[1], number_format)
    return float(thresholds[_relative(histogram, errors).sum(axis=0).argmin()])


def expected_error(layer: LayerStatistics, amax: float, number_format: NumberFormat) -> float:
    """What a threshold costs by a layer's histogram: the root mean square error, relative to that of the values, at all
    timesteps alike; 0 for a layer of nothing.

    Args:
        layer: what was seen.
        amax: the threshold, above 0.
        number_format: what the values become.
    """
    if not layer.histogram.any():
        return 0.0
    bins = layer.histogram.shape[1]
    errors = _expected_errors(np.array([amax * bins / layer.limit]), bins, number_format)
    return float(np.sqrt(_relative(layer.histogram, errors).mean()))


def _relative(histogram: NDArray[np.int64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean squared errors by threshold, relative to the mean square: (buckets that are not empty, candidates)."""
    edges = np.arange(histogram.shape[1] + 1, dtype=np.float64)
    power = histogram @ np.diff(edges**3 / 3)
    return np.asarray((histogram @ errors.T)[power > 0] / power[power > 0, None])


@functools.cache
def _candidates(bins: int, number_format: NumberFormat) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Thresholds from one bin to all (candidates,), and the errors with each (candidates, bins)."""
    thresholds = np.geomspace(1, bins, _CANDIDATES)
    return thresholds, _expected_errors(thresholds, bins, number_format)


def _expected_errors(thresholds: NDArray[np.float64], bins: int, number_format: NumberFormat) -> NDArray[np.float64]:
    """Mean squared errors of values that are spread evenly within each bin, of width 1: (thresholds, bins)."""
    edges = np.arange(bins + 1, dtype=np.float64)
    scale = thresholds[:, None] / number_format.largest
    levels = number_format.magnitudes
    middles = (levels[1:] + levels[:-1]) / 2
    level = np.searchsorted(middles, edges / scale)
    # Integrals of the squared error from 0: from level to level the cube of their distance / 12, and from the nearest
    # level on the cube of the rest, or of what is cut off, / 3.
    up_to_level = np.concatenate([[0.0], np.cumsum(np.diff(levels) ** 3 / 12)])
    integral = scale**3 * (up_to_level[level] + (edges / scale - levels[level]) ** 3 / 3)
    return np.diff(integral, axis=1)


def _x_log_y(x: NDArray[np.int64], y: NDArray[Any]) -> NDArray[np.float64]:
    """0 where ``x`` is 0; ``y`` is positive elsewhere."""
    return np.asarray(x * np.log(np.where(x > 0, y, 1)))
