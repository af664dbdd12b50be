"""Pictures that annotators are tried on: of all modes and of awkward sizes. Seeded."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZES = ((1, 1), (1, 7), (6, 1), (2, 3), (33, 47), (64, 48))
MODES = ("L", "RGB", "RGBA", "P", "1", "I;16", "CMYK")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, a disc, a bright bar and a little noise: edges of every direction and strength."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + 3 * c) + c) + np.cos(y / (5 + 2 * c)) for c in range(3)]
    picture = 128 + 40 * np.stack(waves, axis=-1)
    picture[np.hypot(y - 0.6 * height, x - 0.4 * width) < 0.25 * min(height, width)] = (230, 40, 90)
    picture[height // 5 : height // 5 + 3, width // 4 :] = (20, 20, 30)
    return np.clip(picture + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def in_mode(pixels: np.ndarray, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "RGBA":
        alpha = np.roll(pixels[..., :1], 1, axis=0)
        return Image.fromarray(np.concatenate([pixels, alpha], axis=2))
    return Image.fromarray(pixels).convert(mode)
