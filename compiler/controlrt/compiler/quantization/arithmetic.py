"""What int8 and fp8 mean: the arithmetic of ONNX's QuantizeLinear and DequantizeLinear, with zero at 0.

``q = saturate(round(x / scale))``, half to even, and ``x = q * scale``. Scales are chosen so that the largest magnitude
is the format's largest number: 127 of int8, 448 of fp8. fp8 is E4M3FN of Micikevicius et al. 2022, arXiv 2209.05433:
four bits of exponent, three of mantissa, no infinities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class NumberFormat:
    """Numbers of 8 bits that values are rounded to."""

    name: str
    dtype: np.dtype[Any]
    magnitudes: NDArray[np.float64]
    """All that are used for values from 0 on, rising."""

    @property
    def largest(self) -> float:
        """What the largest magnitude becomes."""
        return float(self.magnitudes[-1])


LEVELS = 127
"""The largest int8."""
REDUCED_LEVELS = 63
"""The largest weight where a CPU adds two products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 does not."""
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT8 = NumberFormat(name="int8", dtype=np.dtype(np.int8), magnitudes=np.arange(LEVELS + 1, dtype=np.float64))
FP8 = NumberFormat(name="fp8", dtype=_FLOAT8, magnitudes=np.arange(0x7F, dtype=np.uint8).view(_FLOAT8).astype(float))
FORMATS = {each.name: each for each in (INT8, FP8)}
"""By the name of the precision."""


def scales_of(amax: NDArray[np.floating[Any]] | float, levels: float = LEVELS) -> NDArray[np.float32]:
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
    values: NDArray[np.floating[Any]],
    scales: NDArray[np.float32] | float,
    axis: int | None = None,
    number_format: NumberFormat = INT8,
) -> NDArray[Any]:
    """QuantizeLinear with a zero point of 0; what is too large becomes 127 or -128, in fp8 448 or -448.

    Args:
        values: of any shape; computed in float32.
        scales: one, or (n,), one for each of the ``n`` places along ``axis``.
        axis: of ``values``; None for one scale.
        number_format: what they become.

    Returns:
        Of the format's dtype and the same shape.
    """
    scaled = np.asarray(values, np.float32) / _along(scales, np.ndim(values), axis)
    if number_format is INT8:
        return np.asarray(np.clip(np.rint(scaled), -128, 127), np.int8)
    return np.asarray(scaled.clip(-number_format.largest, number_format.largest), number_format.dtype)


def dequantize(
    values: NDArray[Any], scales: NDArray[np.float32] | float, axis: int | None = None
) -> NDArray[np.float32]:
    """DequantizeLinear to float32; the arguments are those of :func:`quantize`."""
    return values.astype(np.float32) * _along(scales, values.ndim, axis)


def quantize_weights(
    weights: NDArray[np.floating[Any]], axis: int, levels: float | None = None, number_format: NumberFormat = INT8
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Weights in 8 bits, from ``-levels`` to ``levels``, with a scale for each output channel.

    Args:
        weights: a matrix or kernel.
        axis: of the output channels.
        levels: the largest weight, the format's largest number where not given; see ``REDUCED_LEVELS``.
        number_format: what they become.

    Returns:
        The weights, of the same shape, and (output channels,) scales.

    Raises:
        ValueError: a weight is infinite or not a number.
    """
    others = tuple(each for each in range(weights.ndim) if each != axis % weights.ndim)
    scales = scales_of(np.abs(weights).max(axis=others, initial=0), levels or number_format.largest)
    return quantize(weights, scales, axis, number_format), scales


def _along(scales: NDArray[np.float32] | float, rank: int, axis: int | None) -> NDArray[np.float32]:
    """``scales`` in a shape that stretches over an array of this rank."""
    array = np.asarray(scales, np.float32)
    if axis is None:
        return array
    shape = [1] * rank
    shape[axis] = -1
    return array.reshape(shape)
