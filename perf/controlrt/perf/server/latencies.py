"""Percentiles of latencies, with how sure they are although neighbours in a queue have much in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from controlrt.perf.server.results import LatencyPercentiles, MixedBlock, StepsComparison
from controlrt.perf.statistics import CONFIDENCE, Interval, Ratio

RESAMPLES = 2_000
PERCENTS = (50, 90, 99)


def compare_by_steps(ours: Sequence[MixedBlock], theirs: Sequence[MixedBlock]) -> list[StepsComparison]:
    """Latencies of the same requests at two servers, by number of steps.

    Requests that wait in one queue are late together, so whole stretches of neighbours are resampled, the same ones for
    both servers: the circular block bootstrap (Politis and Romano 1992), with stretches of the cube root of the number
    of requests (Hall, Horowitz and Jing 1995).

    Args:
        ours, theirs: blocks of the same arrivals in the same order.
    """
    both = [[request for block in blocks for request in block.requests] for blocks in (ours, theirs)]
    steps = np.array([request.steps for request in both[0]])
    if [request.steps for request in both[1]] != steps.tolist():
        raise ValueError("the blocks are not of the same requests")
    latencies = np.array([[request.latency for request in requests] for requests in both])
    picked = block_bootstrap(len(steps), RESAMPLES, np.random.default_rng(0))
    return [_comparison(int(each), latencies, steps, picked) for each in np.unique(steps)]


def block_bootstrap(count: int, resamples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Which samples make up each resample: (resamples, count), stretches of neighbours that go on at the front where
    they pass the end."""
    length = max(1, math.ceil(count ** (1 / 3)))
    starts = generator.integers(0, count, (resamples, math.ceil(count / length)))
    return ((starts[:, :, None] + np.arange(length)) % count).reshape(resamples, -1)[:, :count]


def median_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """A median of samples in groups, each of which has something in common.

    Groups are resampled, and samples within each: strategy 2 of Davison and Hinkley 1997, Bootstrap Methods, 3.8, whose
    intervals are rather too wide where groups differ little, while those of few groups kept whole are too narrow.
    """
    generator = np.random.default_rng(0)
    numbers = [np.asarray(group) for group in groups]
    resampled = [
        np.median(np.concatenate([generator.choice(numbers[each], len(numbers[each])) for each in chosen]))
        for chosen in generator.integers(0, len(numbers), (RESAMPLES, len(numbers)))
    ]
    return _interval(float(np.median(np.concatenate(numbers))), np.array(resampled))


def _comparison(
    steps: int, latencies: NDArray[np.float64], all_steps: NDArray[np.int64], picked: NDArray[np.int64]
) -> StepsComparison:
    of_them = all_steps == steps
    found = np.percentile(latencies[:, of_them], PERCENTS, axis=1)  # (percents, servers)
    resampled = [_percentiles(numbers, of_them, picked) for numbers in latencies]
    ours, theirs = (
        LatencyPercentiles(
            **{
                f"p{percent}": _interval(float(found[row, server]), resampled[server][row])
                for row, percent in enumerate(PERCENTS)
            }
        )
        for server in (0, 1)
    )
    ratios = {
        f"p{percent}_ratio": _ratio(float(found[row, 1] / found[row, 0]), resampled[1][row] / resampled[0][row])
        for row, percent in enumerate(PERCENTS)
    }
    return StepsComparison(steps=steps, requests=int(of_them.sum()), latency=ours, baseline_latency=theirs, **ratios)


def _percentiles(
    numbers: NDArray[np.float64], of_them: NDArray[np.bool_], picked: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(percents, resamples), interpolated as ``np.percentile`` does; resamples that have none of them are left out."""
    chosen = of_them[picked]
    counts = chosen.sum(axis=1)
    ordered = np.sort(np.where(chosen, numbers[picked], np.inf), axis=1)[counts > 0]
    last = counts[counts > 0, None] - 1
    positions = last * np.array(PERCENTS) / 100
    below = positions.astype(np.int64)
    low = np.take_along_axis(ordered, below, axis=1)
    high = np.take_along_axis(ordered, np.minimum(below + 1, last), axis=1)
    found: NDArray[np.float64] = low + (positions - below) * (high - low)
    return found.T


def _interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = _ends(resampled)
    return Interval(value=value, low=low, high=high)


def _ratio(value: float, resampled: NDArray[np.float64]) -> Ratio:
    low, high = _ends(resampled)
    return Ratio(value=round(value, 4), low=round(low, 4), high=round(high, 4))


def _ends(resampled: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)
