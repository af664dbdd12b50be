"""A histogram of magnitudes that grows as larger ones come."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.compiler.quantization.statistics import BINS, BUCKETS


class Histogram:
    """How many values had which magnitude, at the timesteps of each interval.

    The limit is the least power of two above every magnitude. It doubles when a larger one comes, and two bins become
    one, so no value is ever put in a wrong bin, and the same values in any order, or in parts that are merged, make
    the same histogram.

    Args:
        buckets: intervals of timesteps.
        bins: all as wide; a power of two.
    """

    counts: NDArray[np.int64]
    """(buckets, bins): bin ``i`` holds magnitudes from ``i * limit / bins`` on, below the next one's."""
    limit: float
    """The upper end of the last bin, 0 as long as there was nothing but zeros."""

    def __init__(self, *, buckets: int = BUCKETS, bins: int = BINS) -> None:
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"the number of bins must be a power of two, at least 2; it is {bins}")
        self.counts, self.limit = np.zeros((buckets, bins), np.int64), 0.0

    @staticmethod
    def restored(counts: NDArray[np.int64], limit: float) -> Histogram:
        """Goes on from the ``counts`` and the ``limit`` of another, which are copied."""
        histogram = Histogram(buckets=counts.shape[0], bins=counts.shape[1])
        histogram.counts[:], histogram.limit = counts, limit
        return histogram

    def add(self, bucket: int, values: NDArray[np.floating[Any]]) -> None:
        """Counts the magnitudes of ``values``, of any shape.

        Raises:
            ValueError: one is infinite or not a number.
        """
        magnitudes = np.abs(values, dtype=np.float64).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if not math.isfinite(largest):
            raise ValueError("there are values that are infinite or not a number")
        self._make_room(_power_of_two_above(largest))
        bins = self.counts.shape[1]
        # Exact, since both are powers of two.
        places = (
            (magnitudes * (bins / self.limit)).astype(np.int64) if self.limit else np.zeros(magnitudes.size, np.int64)
        )
        self.counts[bucket] += np.bincount(places, minlength=bins)

    def _make_room(self, limit: float) -> None:
        """Raises the limit to a power of two, unless it is as high."""
        if limit <= self.limit:
            return
        if self.limit:
            buckets, bins = self.counts.shape
            joined = min(round(limit / self.limit), bins)
            sums = self.counts.reshape(buckets, bins // joined, joined).sum(axis=2)
            self.counts[:] = 0
            self.counts[:, : bins // joined] = sums
        self.limit = limit


def _power_of_two_above(value: float) -> float:
    """0 for 0."""
    return math.ldexp(1.0, math.frexp(value)[1]) if value else 0.0
