"""Bilinear interpolation, for regions of control and for latents of another size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def resize_bilinear(planes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """``planes`` (..., height, width) at another size, interpolated between pixel centres.

    Equals ``torch.nn.functional.interpolate(mode="bilinear")``: there is no filter against aliasing.
    """
    above, below, down = _neighbours(planes.shape[-2], height)
    left, right, across = _neighbours(planes.shape[-1], width)
    columns = planes[..., left] * (1 - across) + planes[..., right] * across
    rows = columns[..., above, :] * (1 - down)[:, None] + columns[..., below, :] * down[:, None]
    return np.asarray(rows, np.float32)


def _neighbours(have: int, want: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """For each of ``want`` positions the pixels before and after it, and how far it lies from one to the other."""
    centre = np.clip((np.arange(want) + 0.5) * have / want - 0.5, 0, None)
    before = np.minimum(centre.astype(np.intp), have - 1)
    return before, np.minimum(before + 1, have - 1), centre - before
