"""What the server is asked for: arrivals, the mix, and the same request over HTTP and to the pipeline."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy import stats

from controlrt.perf.server.client import decode_picture
from controlrt.perf.server.workload import STEPS, Asked, Workload, alternating, poisson_arrivals

WORKLOAD = Workload(width=64, height=64, control="canny", seed=3)


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = np.array(poisson_arrivals(5000, 4.0, (1, 2)))
    gaps = np.diff(arrivals, prepend=0.0)
    assert (gaps > 0).all()
    assert stats.kstest(gaps, stats.expon(scale=1 / 4.0).cdf).pvalue > 0.01
    counts = Counter(np.floor(arrivals).astype(int).tolist())
    per_second = np.array([counts[second] for second in range(int(arrivals[-1]))])
    assert abs(per_second.var() / per_second.mean() - 1) < 0.2  # of a Poisson distribution both are the rate


def test_the_same_seed_gives_the_same_arrivals_and_another_others() -> None:
    assert WORKLOAD.arrivals(0, 20, 1.0) == WORKLOAD.arrivals(0, 20, 1.0)
    assert WORKLOAD.arrivals(0, 20, 1.0) != WORKLOAD.arrivals(20, 20, 1.0)
    assert WORKLOAD.mixed(0, 30) == WORKLOAD.mixed(0, 30)


def test_the_mix_has_as_many_of_each() -> None:
    asked = WORKLOAD.mixed(100, 60)
    assert Counter(each.steps for each in asked) == dict.fromkeys(STEPS, 20)
    assert [each.steps for each in asked] != sorted(each.steps for each in asked)
    assert [each.seed for each in asked] == list(range(100, 160))


def test_a_request_and_a_call_ask_for_the_same() -> None:
    asked = Asked(seed=5, steps=4, width=64, height=48, controls=("canny",), guidance_scale=2.0)
    body, arguments = asked.body(timeout_ms=100), asked.arguments()
    np.testing.assert_array_equal(decode_picture(body.pop("image")["canny"]), arguments.pop("image")["canny"])
    assert body.pop("timeout_ms") == 100
    assert body == arguments


def test_blocks_take_turns() -> None:
    assert list(alternating(3)) == [(0, False), (0, True), (1, True), (1, False), (2, False), (2, True)]
