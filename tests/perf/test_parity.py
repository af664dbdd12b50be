"""Pictures compared, step by step and picture by picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from controlrt.perf.parity import MAX_LATENT_ERROR, compare

RNG = np.random.default_rng(0)
PICTURE = RNG.random((64, 64, 3), np.float32)


def test_what_is_not_finite_is_as_wrong_as_can_be(tmp_path: Path) -> None:
    broken = PICTURE.copy()
    broken[0, 0, 0] = np.nan
    latents = np.ones((2, 1, 4, 8, 8), np.float32)
    found = recorded(tmp_path / "found.npz", broken, latents * [[[[[1]]]], [[[[np.inf]]]]])
    parity = compare(found, recorded(tmp_path / "expected.npz", PICTURE, latents), "eager", 30)
    assert (parity.psnr_db, parity.ssim, parity.latent_errors) == (0, 0, (0, MAX_LATENT_ERROR))
    assert not parity.is_met


def test_errors_are_of_each_step_and_the_worst_picture_counts(tmp_path: Path) -> None:
    latents = RNG.normal(size=(3, 1, 4, 8, 8)).astype(np.float32)
    off = latents.copy()
    off[1] *= 1.01
    found = recorded(tmp_path / "found.npz", PICTURE, off)
    parity = compare(found, recorded(tmp_path / "expected.npz", PICTURE, latents), "eager", 45)
    assert parity.latent_errors == pytest.approx((0, 0.01, 0), rel=1e-3)
    assert parity.is_met
    assert parity.compared_with == "eager"


def test_a_contender_may_give_no_latents_away(tmp_path: Path) -> None:
    found = recorded(tmp_path / "found.npz", PICTURE, np.array([], np.float32))
    expected = recorded(tmp_path / "expected.npz", PICTURE, np.ones((2, 1, 4, 8, 8), np.float32))
    parity = compare(found, expected, "eager", 45, gives_latents=False)
    assert (parity.latent_errors, parity.is_met) == ((), True)
    with pytest.raises(ValueError, match="zip"):
        compare(found, expected, "eager", 45)


def recorded(file: Path, picture: NDArray[np.float32], latents: NDArray[np.float32]) -> Path:
    np.savez(file, pictures=picture[None], latents=latents)
    return file
