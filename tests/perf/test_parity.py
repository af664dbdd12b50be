"""Pictures compared, against answers known by hand and scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio

from controlrt.perf.parity import MAX_LATENT_ERROR, MAX_PSNR_DB, compare, psnr, ssim

RNG = np.random.default_rng(0)
PICTURE = RNG.random((64, 64, 3), np.float32)


def test_psnr_is_scikit_image_s_and_has_a_top() -> None:
    noisy = np.clip(PICTURE + RNG.normal(0, 0.05, PICTURE.shape), 0, 1).astype(np.float32)
    assert psnr(noisy, PICTURE) == pytest.approx(peak_signal_noise_ratio(PICTURE, noisy, data_range=1.0), abs=1e-4)
    assert psnr(np.full_like(PICTURE, 0.5), np.full_like(PICTURE, 0.6)) == pytest.approx(20, abs=1e-4)
    assert psnr(PICTURE, PICTURE) == MAX_PSNR_DB


def test_ssim_is_one_for_the_same_and_little_for_another() -> None:
    assert ssim(PICTURE, PICTURE) == pytest.approx(1)
    assert ssim(RNG.random((64, 64, 3), np.float32), PICTURE) < 0.1


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


def recorded(file: Path, picture: NDArray[np.float32], latents: NDArray[np.float32]) -> Path:
    np.savez(file, pictures=picture[None], latents=latents)
    return file
