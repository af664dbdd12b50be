"""Ratios under drift: what is known to be faster by a factor is measured to be."""

from __future__ import annotations

import numpy as np
import pytest

from controlrt.perf.ratios import Measured

SECONDS = {"reference": 1.0, "twice": 0.5, "slow": 4.0, "other": 0.25}


def group(*names: str, seed: int, drift: float = 1.0) -> dict[str, list[float]]:
    """Ten rounds on a machine that gets slower by ``drift``; noise of 1% on every step."""
    rng = np.random.default_rng(seed)
    slowness = np.linspace(1, drift, 10)
    return {name: list(SECONDS[name] * slowness * rng.normal(1, 0.01, 10)) for name in names}


def test_drift_cancels_within_a_group() -> None:
    measured = Measured([group("reference", "twice", seed=0, drift=5)], "reference")
    ratio = measured.speedup("twice", "reference")
    assert ratio.value == pytest.approx(2, rel=0.02)
    assert ratio.low <= 2.0 * 1.01
    assert ratio.high >= 2.0 * 0.99
    assert ratio.high - ratio.low < 0.1


def test_groups_are_compared_by_way_of_the_reference() -> None:
    """The machine is three times slower while the second group runs; medians of seconds would say 5.3 for 16."""
    later = {name: [3 * s for s in seconds] for name, seconds in group("reference", "other", seed=2).items()}
    measured = Measured([group("reference", "slow", seed=1), later], "reference")
    ratio = measured.speedup("other", "slow")
    assert ratio.value == pytest.approx(16, rel=0.03)
    assert ratio.low < 16.3
    assert ratio.high > 15.7
    assert measured.speedup("slow", "other").value == pytest.approx(1 / 16, rel=0.03)


def test_the_reference_uses_every_group_it_shares() -> None:
    measured = Measured([group("reference", "slow", seed=1), group("reference", "other", seed=2)], "reference")
    assert measured.speedup("reference", "slow").value == pytest.approx(4, rel=0.02)
    assert measured.speedup("reference", "reference").value == 1
    assert measured.fastest(["slow", "other"]) == "other"


def test_one_round_has_no_interval() -> None:
    ratio = Measured([{"reference": [2.0], "twice": [1.0]}], "reference").speedup("twice", "reference")
    assert (ratio.low, ratio.value, ratio.high) == (2, 2, 2)


def test_a_group_needs_the_reference() -> None:
    with pytest.raises(ValueError, match="without the reference"):
        Measured([{"twice": [1.0]}], "reference")
