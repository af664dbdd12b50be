"""Pictures compared, against answers known by hand and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from controlrt.engines.likeness import MAX_PSNR_DB, psnr, ssim

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
