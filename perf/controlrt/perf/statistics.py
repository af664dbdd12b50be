"""What is said of samples: percentiles, medians with how sure they are, and whether something became slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
"""Of an interval, where nothing else is said."""
FEWEST_ROUNDS = 5
"""To judge by: all of fewer samples lie on one side of the median too often (of five, once in 16 times)."""

Verdict = Literal["faster", "slower", "same", "cannot tell"]


class Percentiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of seconds, or of whatever the samples are. p90 of 10 samples and p99 of 100 is where they begin to say much."""

    p50: float
    p90: float
    p99: float

    @property
    def spread(self) -> float:
        """p99 over p50: how far the slow ones are from the rest."""
        return self.p99 / self.p50 if self.p50 > 0 else 1.0


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value at position ``(n - 1) percent / 100`` of the sorted samples, interpolated linearly between neighbours.

    Definition 7 of Hyndman and Fan, "Sample Quantiles in Statistical Packages" (1996); NumPy's default. The 0th is the
    smallest, the 100th the largest, and none lies outside of what was measured.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples, no percentiles")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def percentiles(samples: Sequence[float]) -> Percentiles:
    """The three that are reported."""
    return Percentiles(p50=percentile(samples, 50), p90=percentile(samples, 90), p99=percentile(samples, 99))


class Ratio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One time over another, and how sure that is."""

    value: float
    low: float
    high: float
    """Ends of the confidence interval (percentile bootstrap over rounds), of 95% where nothing else is said."""

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves no doubt which of the two is larger."""
        return self.low > 1 or self.high < 1


class Interval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number with the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A number made of medians, with what it would have been on resampled rounds."""

    value: float
    resampled: NDArray[np.float64]
    """(RESAMPLES,)"""

    def __mul__(self, other: Estimate) -> Estimate:
        return Estimate(value=self.value * other.value, resampled=self.resampled * other.resampled)

    def __truediv__(self, other: Estimate) -> Estimate:
        return Estimate(value=self.value / other.value, resampled=self.resampled / other.resampled)

    def ratio(self, confidence: float = CONFIDENCE) -> Ratio:
        """The value, and the interval that the middle of the resampled values spans."""
        low, high = self._ends(confidence)
        return Ratio(value=round(self.value, 4), low=round(low, 4), high=round(high, 4))

    def interval(self) -> Interval:
        """The same of 95%, of a number that is no ratio and not rounded."""
        low, high = self._ends(CONFIDENCE)
        return Interval(value=self.value, low=low, high=high)

    def _ends(self, confidence: float) -> tuple[float, float]:
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.resampled, [tail, 1 - tail])
        return float(low), float(high)


class Bootstrap:
    """Resamples rounds (Efron 1979, percentile intervals). Every call draws anew; the same calls draw the same again.

    Rounds count as independent. Numbers that follow a slow drift are not, and their intervals are too narrow: give
    ratios within a round, from which the drift is gone.
    """

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def median(self, rounds: Sequence[float] | NDArray[np.float64]) -> Estimate:
        """The median of one number per round."""
        numbers = np.asarray(rounds, np.float64)
        picked = self._generator.integers(0, len(numbers), (RESAMPLES, len(numbers)))
        return Estimate(value=float(np.median(numbers)), resampled=np.median(numbers[picked], axis=1))


def joint_confidence(count: int) -> float:
    """The confidence that each of ``count`` intervals needs for all of them to hold at once with 95% (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(count, 1)


def verdict(found: Ratio, threshold: float) -> Verdict:
    """What a change means, where those of up to ``threshold`` do not matter.

    slower, faster
        The interval leaves 1 out, and the change itself is larger than the threshold. Where nothing changed this is
        said in at most one of 40 cases each (of an interval of 95%), and less often the smaller the noise is beside
        the threshold.
    same
        The whole interval is within the threshold.
    cannot tell
        Anything else: too much noise, and more rounds would tell.

    Args:
        found: new over old.
        threshold: a fraction; 0.03 lets through ratios from 1/1.03 to 1.03.
    """
    band = 1 + threshold
    if found.is_certain and found.value > band:
        return "slower"
    if found.is_certain and found.value < 1 / band:
        return "faster"
    return "same" if found.low >= 1 / band and found.high <= band else "cannot tell"
