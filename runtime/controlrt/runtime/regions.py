"""The effective region of a control: one mask, brought to the size of every residual."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def resize_region(region: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """``region`` by bilinear interpolation between pixel centres: (height, width).

    As in the web UI's extension: ``torch.nn.functional.interpolate(mode="bilinear")``, with no filter against aliasing.
    """
    upper, lower, down = _neighbours(region.shape[0], height)
    left, right, across = _neighbours(region.shape[1], width)
    columns = region[:, left] * (1 - across) + region[:, right] * across
    return (columns[upper] * (1 - down)[:, None] + columns[lower] * down[:, None]).astype(np.float32)


def _neighbours(have: int, want: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """For each of ``want`` positions the pixels before and after it, and how far it lies from one to the other."""
    centre = np.clip((np.arange(want) + 0.5) * have / want - 0.5, 0, None)
    before = np.minimum(centre.astype(np.intp), have - 1)
    return before, np.minimum(before + 1, have - 1), centre - before
