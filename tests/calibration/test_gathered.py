from __future__ import annotations

import numpy as np
import pytest

from controlrt.calibration.gathered import Gathered
from controlrt.compiler.quantization.statistics import BUCKETS
from controlrt.runtime.errors import CalibrationError

RNG = np.random.default_rng(0)
LAUNCHES = [(timestep, RNG.standard_normal((5, 64), np.float32)) for timestep in (981.0, 12.5, 55.0, 500.0)]
"""Timesteps and values (channels, ...)."""


def fold(gathered: Gathered, launches: list) -> Gathered:
    for timestep, values in launches:
        gathered.add("conv of unet", timestep, np.abs(values).max(axis=1), values.ravel())
    return gathered


def test_against_numpy() -> None:
    found = fold(Gathered.of(5), LAUNCHES).statistics()
    everything = np.abs(np.stack([values for _, values in LAUNCHES]))
    np.testing.assert_array_equal(found.channel_amax, everything.max(axis=(0, 2)))
    expected = np.zeros(BUCKETS)
    expected[[9, 0, 5]] = everything[0].max(), everything[1:3].max(), everything[3].max()
    np.testing.assert_array_equal(found.bucket_amax, expected.astype(np.float32))
    np.testing.assert_array_equal(found.histogram.sum(axis=1), [640, 0, 0, 0, 0, 320, 0, 0, 0, 320])
    assert found.limit >= found.amax


def test_going_on_is_as_if_it_had_never_stopped() -> None:
    whole = fold(Gathered.of(5), LAUNCHES).statistics()
    half = fold(Gathered.of(5), LAUNCHES[:2]).statistics()
    found = fold(Gathered.restored(half), LAUNCHES[2:]).statistics()
    for kind in ("channel_amax", "bucket_amax", "histogram"):
        np.testing.assert_array_equal(getattr(found, kind), getattr(whole, kind))
    assert found.limit == whole.limit


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_names_layer_and_timestep(value: float) -> None:
    amax = np.array([1, value], np.float32)
    with pytest.raises(
        CalibrationError, match="layer conv of unet reads values at timestep 981 that are infinite or not"
    ):
        Gathered.of(2).add("conv of unet", 981.0, amax, np.ones(4, np.float32))
