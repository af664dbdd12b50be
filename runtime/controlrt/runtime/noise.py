"""Starting noise that equals ``torch.randn`` on a CPU generator, from NumPy alone.

PyTorch seeds the classic MT19937 with the seed's low 32 bits and turns uniforms into normals by the Box-Muller
transform (Box & Muller 1958). From 16 values on it works on float32 uniforms of 24 bits in blocks of 16, the first
half of a block giving radii and the second half angles; a last block that is not full is drawn anew over the last 16
values. Below 16 values it draws 53-bit uniforms in pairs and rounds each float64 normal to float32.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError

_BLOCK = 16


class TorchGenerator:
    """A stream of draws equal to those of ``torch.Generator("cpu").manual_seed(seed)``.

    Normals agree with PyTorch's to the last float32 bit or two: logarithm and cosine differ there by that much.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not -(2**63) <= seed < 2**64:
            raise ParameterError("seed", seed, "a whole number from -2^63 to 2^64 - 1")
        self._random = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal values of the given shape, float32; the same as ``torch.randn(shape, generator=...)``."""
        size = math.prod(shape)
        return (self._blocks(size) if size >= _BLOCK else self._singles(size)).reshape(shape)

    def _blocks(self, size: int) -> NDArray[np.float32]:
        values = self._uniform24(size)
        full = size - size % _BLOCK
        values[:full] = _box_muller(values[:full])
        if size % _BLOCK:
            values[-_BLOCK:] = _box_muller(self._uniform24(_BLOCK))
        return values

    def _singles(self, size: int) -> NDArray[np.float32]:
        values = np.empty(size, np.float32)
        for i in range(size):
            if self._spare is not None:
                values[i], self._spare = self._spare, None
                continue
            u1, u2 = self._uniform53(), self._uniform53()
            radius, angle = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
            values[i], self._spare = radius * math.cos(angle), radius * math.sin(angle)
        return values

    def _uniform24(self, size: int) -> NDArray[np.float32]:
        return (self._words(size) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._words(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53

    def _words(self, size: int) -> NDArray[np.uint32]:
        """The generator's next 32-bit outputs (the full range of ``randint`` is the raw stream)."""
        return self._random.randint(0, 2**32, size=size, dtype=np.uint32)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    u1, u2 = np.split(uniform.reshape(-1, _BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u1))
    angle = np.float32(2 * np.pi) * u2
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
