"""How a consistency model is told its guidance scale, which it was distilled with in place of an unconditional row."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def embed_guidance_scale(guidance_scale: float, channels: int) -> NDArray[np.float32]:
    """Sines and then cosines of 1000 w at frequencies from 1 down to 1/10000, with w = guidance_scale - 1: (channels,).

    The UNet adds a projection of it to its timestep's embedding (Meng et al. 2023, arXiv 2210.03142; Luo et al. 2023,
    arXiv 2310.04378). Angles are float32, as where such models are trained: they go to thousands, and rounding shows.
    """
    half = channels // 2
    frequencies = np.exp(np.arange(half) * -math.log(10000) / (half - 1)).astype(np.float32)
    angles = np.float32(guidance_scale - 1) * np.float32(1000) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(channels % 2, np.float32)])
