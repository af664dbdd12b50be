"""How like two pictures are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PSNR_DB = 200.0
"""For pictures that are the same."""
_SSIM: dict[str, Any] = {
    "data_range": 1.0,
    "channel_axis": -1,
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
}
"""As Wang et al. 2004 define it, in scikit-image's terms."""


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Peak signal-to-noise ratio in dB, of values in [0, 1]; 0 for what is not finite."""
    if not np.isfinite(found).all():
        return 0.0
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return min(MAX_PSNR_DB, -10 * float(np.log10(error))) if error > 0 else MAX_PSNR_DB


def ssim(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Structural similarity of two pictures (height, width, 3); 0 for what is not finite."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(found, expected, **_SSIM)) if np.isfinite(found).all() else 0.0
