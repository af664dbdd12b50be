"""Matrix products that take as long as they are told to."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from controlrt.perf import ceiling


def product(seconds_at_probe: float) -> Callable[[int], Callable[[], object]]:
    return lambda side: lambda: time.sleep(seconds_at_probe * (side / ceiling.PROBE) ** 3)


def test_the_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "SECONDS", 0.1)
    rate = ceiling._rate(product(0.001), 2 * ceiling.PROBE)
    assert rate is not None
    assert rate == pytest.approx(2 * (2 * ceiling.PROBE) ** 3 / 0.008, rel=0.5)


def test_a_dtype_without_kernels_is_left_out_after_small_products() -> None:
    started = time.monotonic()
    assert ceiling._rate(product(0.05), 8 * ceiling.PROBE) is None
    assert time.monotonic() - started < 5
