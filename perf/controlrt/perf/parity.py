"""Whether a contender draws the right picture: its first one against eager PyTorch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from controlrt.compiler.reference import relative_error
from controlrt.engines.likeness import psnr, ssim
from controlrt.perf.results import Parity

MAX_LATENT_ERROR = 1e9
"""For latents that are not finite, which JSON has no number for."""


def compare(
    found: Path, expected: Path, compared_with: str, min_psnr_db: float, *, gives_latents: bool = True
) -> Parity:
    """Compares what two contenders recorded of the same call.

    Args:
        found, expected: files with ``pictures`` (batch, height, width, 3) in [0, 1] and ``latents`` (steps, ...).
        compared_with: whose ``expected`` is.
        min_psnr_db: what is asked.
        gives_latents: whether the contender gives its latents away; they are not compared else.
    """
    with np.load(found) as ours, np.load(expected) as theirs:
        pictures, wanted = ours["pictures"], theirs["pictures"]
        steps = zip(ours["latents"], theirs["latents"], strict=True) if gives_latents else ()
        return Parity(
            compared_with=compared_with,
            psnr_db=psnr(pictures, wanted),
            ssim=min(map(ssim, pictures, wanted)),
            latent_errors=tuple(min(MAX_LATENT_ERROR, relative_error(mine, its)) for mine, its in steps),
            min_psnr_db=min_psnr_db,
        )
