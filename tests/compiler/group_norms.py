"""Group norms in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def group_norm(
    x: NDArray[np.float32], scale: ArrayLike, bias: ArrayLike, groups: int, epsilon: float
) -> NDArray[np.float64]:
    """Wu & He 2018, arXiv 1803.08494, eq. 1 to 3 and 6, in float64."""
    rows, channels, *sides = x.shape
    grouped = x.astype(np.float64).reshape(rows, groups, -1)
    mean, variance = grouped.mean(2, keepdims=True), grouped.var(2, keepdims=True)
    normal = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    by_channel = (channels, *[1] * len(sides))
    return normal * np.reshape(scale, by_channel) + np.reshape(bias, by_channel)
