"""Whether a contender draws the right picture: its first one against eager PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.compiler.reference import relative_error
from controlrt.perf.results import Parity

MAX_PSNR_DB = 200.0
"""For pictures that are the same."""
MAX_LATENT_ERROR = 1e9
"""For latents that are not finite, which JSON has no number for."""
SSIM: dict[str, Any] = {
    "data_range": 1.0,
    "channel_axis": -1,
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
}
"""As Wang et al. 2004 define it, in scikit-image's terms."""


def compare(found: Path, expected: Path, compared_with: str, min_psnr_db: float) -> Parity:
    """Compares what two contenders recorded of the same call.

    Args:
        found, expected: files with ``pictures`` (batch, height, width, 3) in [0, 1] and ``latents`` (steps, ...).
        compared_with: whose ``expected`` is.
        min_psnr_db: what is asked.
    """
    with np.load(found) as ours, np.load(expected) as theirs:
        pictures, wanted = ours["pictures"], theirs["pictures"]
        steps = zip(ours["latents"], theirs["latents"], strict=True)
        return Parity(
            compared_with=compared_with,
            psnr_db=psnr(pictures, wanted),
            ssim=min(map(ssim, pictures, wanted)),
            latent_errors=tuple(min(MAX_LATENT_ERROR, relative_error(mine, its)) for mine, its in steps),
            min_psnr_db=min_psnr_db,
        )


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Peak signal-to-noise ratio in dB, of values in [0, 1]; 0 for what is not finite."""
    if not np.isfinite(found).all():
        return 0.0
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return min(MAX_PSNR_DB, -10 * float(np.log10(error))) if error > 0 else MAX_PSNR_DB


def ssim(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Structural similarity of two pictures (height, width, 3); 0 for what is not finite."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(found, expected, **SSIM)) if np.isfinite(found).all() else 0.0
