"""Percentiles with intervals, of requests that have much in common with their neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from controlrt.perf.server.latencies import block_bootstrap, compare_by_steps, median_interval
from controlrt.perf.server.results import MixedBlock, Request


def block(pair: int, latencies: list[float], steps: list[int], policy: str = "shortest") -> MixedBlock:
    requests = tuple(
        Request(steps=each, due=float(number), latency=latency, status=200)
        for number, (latency, each) in enumerate(zip(latencies, steps, strict=True))
    )
    return MixedBlock(policy=policy, pair=pair, requests=requests)


def test_percentiles_are_numpys_by_steps() -> None:
    random = np.random.default_rng(1)
    steps = [4, 20, 50] * 40
    ours, theirs = random.exponential(1.0, 120), random.exponential(3.0, 120)
    found = compare_by_steps(
        [block(0, ours[:60].tolist(), steps[:60]), block(1, ours[60:].tolist(), steps[60:])],
        [block(0, theirs[:60].tolist(), steps[:60]), block(1, theirs[60:].tolist(), steps[60:])],
    )
    assert [each.steps for each in found] == [4, 20, 50]
    for number, each in enumerate(found):
        assert each.requests == 40
        mine, its = ours[number::3], theirs[number::3]
        assert each.latency.p90.value == pytest.approx(np.percentile(mine, 90))
        assert each.baseline_latency.p99.value == pytest.approx(np.percentile(its, 99))
        assert each.p50_ratio.value == pytest.approx(np.median(its) / np.median(mine), abs=1e-4)
        assert each.latency.p50.low < each.latency.p50.value < each.latency.p50.high


def test_ratios_are_of_the_same_requests() -> None:
    """Three times as long, every single one: the ratio is certain however much latencies vary."""
    latencies = np.random.default_rng(2).exponential(1.0, 90).tolist()
    (found,) = compare_by_steps([block(0, latencies, [4] * 90)], [block(0, [3 * each for each in latencies], [4] * 90)])
    assert (found.p99_ratio.low, found.p99_ratio.value, found.p99_ratio.high) == (3, 3, 3)
    assert found.latency.p50.high > 1.2 * found.latency.p50.low


def test_intervals_hold_the_median_of_a_queue() -> None:
    """Of an autoregressive process whose median is 0: resampling single requests would hold it too seldom."""
    random, held, count = np.random.default_rng(3), {"blocks": 0, "single": 0}, 60
    for _ in range(count):
        noise, values = random.standard_normal(320), [0.0]
        for each in noise:
            values.append(0.7 * values[-1] + each)
        samples = np.array(values[20:320])
        picked = block_bootstrap(len(samples), 300, random)
        low, high = np.quantile(np.median(samples[picked], axis=1), [0.025, 0.975])
        held["blocks"] += low <= 0 <= high
        single = median_interval([samples.tolist()])
        held["single"] += single.low <= 0 <= single.high
    assert held["blocks"] / count > 0.75
    assert held["single"] < held["blocks"]


def test_blocks_of_neighbours_go_on_at_the_front() -> None:
    picked = block_bootstrap(27, 500, np.random.default_rng(4))
    assert picked.shape == (500, 27)
    assert ((np.diff(picked.reshape(-1, 9, 3), axis=2) % 27) == 1).all()
    assert np.bincount(picked.ravel(), minlength=27).min() > 400  # each as likely as the others


def test_other_requests_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="not of the same requests"):
        compare_by_steps([block(0, [1.0, 1.0], [4, 20])], [block(0, [1.0, 1.0], [20, 4])])


def test_intervals_hold_the_median_of_starts_that_differ() -> None:
    """Ten starts, each of its own mean about 0: taking all samples for one group would hold the median too seldom."""
    random, held, count = np.random.default_rng(4), {"starts": 0, "single": 0}, 60
    for _ in range(count):
        starts = random.standard_normal((10, 1)) + 0.5 * random.standard_normal((10, 10))
        found = {"starts": median_interval(starts.tolist()), "single": median_interval([starts.ravel().tolist()])}
        assert found["starts"].value == found["single"].value == np.median(starts)
        for name, each in found.items():
            held[name] += each.low <= 0 <= each.high
    assert held["starts"] / count > 0.85
    assert held["single"] / count < 0.7
