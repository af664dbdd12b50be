"""What int8 means: the arithmetic of ONNX's QuantizeLinear and DequantizeLinear, with zero at 0.

``q = saturate(round(x / scale))``, half to even, and ``x = q * scale``. Scales are chosen so that the largest magnitude
is 127.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = 127
"""The largest int8."""
REDUCED_LEVELS = 63
"""The largest weight where a CPU adds two products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 does not."""


def scales_of(amax: NDArray[np.floating[Any]] | float, levels: int = LEVELS) -> NDArray[np.float32]:
    """The scales at which these largest magnitudes are ``levels``, as float32 of the same shape.

    The scale of nothing but zeros is 1, since none may be 0; so is one that float32 has no normal number for.

    Raises:
        ValueError: one is infinite or not a number.
    """
    scales = np.asarray(amax, np.float32) / np.float32(levels)
    if not np.isfinite(scales).all():
        raise ValueError("there are magnitudes that are infinite or not a number; they have no scale")
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)


def quantize(
    values: NDArray[np.floating[Any]], scales: NDArray[np.float32] | float, axis: int | None = None
) -> NDArray[np.int8]:
    """QuantizeLinear to int8 with a zero point of 0; what is too large becomes 127 or -128.

    Args:
        values: of any shape; computed in float32.
        scales: one, or (n,), one for each of the ``n`` places along ``axis``.
        axis: of ``values``; None for one scale.
    """
    rounded = np.rint(np.asarray(values, np.float32) / _along(scales, np.ndim(values), axis))
    found: NDArray[np.int8] = np.clip(rounded, -128, 127).astype(np.int8)
    return found


def dequantize(
    values: NDArray[np.int8], scales: NDArray[np.float32] | float, axis: int | None = None
) -> NDArray[np.float32]:
    """DequantizeLinear to float32; the arguments are those of :func:`quantize`."""
    return values.astype(np.float32) * _along(scales, values.ndim, axis)


def quantize_weights(
    weights: NDArray[np.floating[Any]], axis: int, levels: int = LEVELS
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights in int8, from ``-levels`` to ``levels``, with a scale for each output channel.

    Args:
        weights: a matrix or kernel.
        axis: of the output channels.
        levels: the largest weight; see ``REDUCED_LEVELS``.

    Returns:
        The weights, of the same shape, and (output channels,) scales.

    Raises:
        ValueError: a weight is infinite or not a number.
    """
    others = tuple(each for each in range(weights.ndim) if each != axis % weights.ndim)
    scales = scales_of(np.abs(weights).max(axis=others, initial=0), levels)
    return quantize(weights, scales, axis), scales


def _along(scales: NDArray[np.float32] | float, rank: int, axis: int | None) -> NDArray[np.float32]:
    """``scales`` in a shape that stretches over an array of this rank."""
    array = np.asarray(scales, np.float32)
    if axis is None:
        return array
    shape = [1] * rank
    shape[axis] = -1
    return array.reshape(shape)
