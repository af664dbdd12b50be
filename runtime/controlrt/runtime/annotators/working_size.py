"""The size at which an annotator works: the picture scaled so that its shorter side is ``processor_res``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError
from controlrt.runtime.pictures import MAX_PIXELS


def at_resolution(pixels: NDArray[Any], resolution: int) -> NDArray[Any]:
    """``pixels`` with a shorter side of ``resolution``, in the same proportions; as they are where it is 0.

    As in the web UI extension, bicubic where it grows and by the mean of areas where it shrinks; sides are rounded,
    halves to even.

    Raises:
        ParameterError: more pixels than are worked on.
    """
    height, width = pixels.shape[:2]
    if resolution in (0, min(height, width)):
        return pixels
    ratio = resolution / min(height, width)
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    if size[0] * size[1] > MAX_PIXELS:
        raise ParameterError(
            "processor_res", resolution, f"small enough for {MAX_PIXELS:,} pixels; it makes {size[0]}x{size[1]}"
        )
    import cv2

    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if ratio > 1 else cv2.INTER_AREA)
    return np.asarray(resized, pixels.dtype).reshape(size[1], size[0], *pixels.shape[2:])


def three_channels(grey: NDArray[Any]) -> NDArray[np.uint8]:
    """(height, width) as (height, width, 3), rounded down to 8 bits and cut to 0..255."""
    eight_bit = np.clip(grey, 0, 255).astype(np.uint8)
    return np.repeat(eight_bit[..., None], 3, axis=2)
