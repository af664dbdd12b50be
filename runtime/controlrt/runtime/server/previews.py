"""What a picture will look like, from its latents alone: a linear map from a latent pixel to a colour."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.pictures import to_pixels

Array = NDArray[np.float32]
_TILE = 32
"""Pixels of a side of the coloured squares that the map is fitted on."""


def fit_preview(encode: Callable[[Array], Array], width: int, height: int) -> Array:
    """The map that best turns latents into the colours that they were encoded from (least squares).

    Args:
        encode: a picture (1, height, width, 3) in [0, 1] to latents (1, channels, rows, columns).
        width, height: of a picture that it takes.

    Returns:
        (channels + 1, 3); the last row is the constant.
    """
    colours = np.random.default_rng(0).random((-(-height // _TILE), -(-width // _TILE), 3), np.float32)
    picture = colours.repeat(_TILE, axis=0).repeat(_TILE, axis=1)[:height, :width]
    latents = encode(picture[None])[0]
    channels, rows, columns = latents.shape
    means = picture.reshape(rows, height // rows, columns, width // columns, 3).mean(axis=(1, 3))
    inputs = np.concatenate([latents, np.ones((1, rows, columns), np.float32)]).reshape(channels + 1, -1).T
    fitted: Array = np.linalg.lstsq(inputs, means.reshape(-1, 3), rcond=None)[0].astype(np.float32)
    return fitted


def preview(latents: Array, colours: Array) -> NDArray[np.uint8]:
    """A small picture (rows, columns, 3) of latents (channels, rows, columns)."""
    linear: Array = np.tensordot(latents, colours[:-1], axes=(0, 0)) + colours[-1]
    return to_pixels(linear.clip(0, 1))
