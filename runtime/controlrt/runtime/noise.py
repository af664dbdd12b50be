"""Noise that equals ``torch.randn`` on PyTorch's generators, from NumPy alone.

The CPU generator: PyTorch seeds the classic MT19937 with the seed's low 32 bits and turns uniforms into normals by the
Box-Muller transform (Box & Muller 1958). From 16 values on it works on float32 uniforms of 24 bits in blocks of 16, the
first half of a block giving radii and the second half angles; a last block that is not full is drawn anew over the last
16 values. Below 16 values it draws 53-bit uniforms in pairs and rounds each float64 normal to float32.

The CUDA generator: Philox4x32-10 (Salmon et al. 2011) keyed by the seed. Every value has a thread of its own, whose
counter is the value's index and the number of draws before; the first two of its four words give the normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError

_BLOCK = 16
KINDS = ("cpu", "gpu")


class Generator(Protocol):
    """A stream of normal values."""

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next standard normal values, of the given shape, float32."""


def generator(kind: str, seed: int) -> Generator:
    """The generator that PyTorch has on ``kind`` of device, "cpu" or "gpu".

    Raises:
        ParameterError: another kind, or a seed that PyTorch would not take.
    """
    if kind not in KINDS:
        raise ParameterError("noise", kind, "cpu or gpu, the device whose generator is followed")
    return TorchGenerator(seed) if kind == "cpu" else PhiloxGenerator(seed)


class Draws:
    """The draws of one call, in diffusers' order: one generator for the whole batch, or a list with one per picture."""

    def __init__(self, seed: int | Sequence[int], batch: int, kind: str = "cpu") -> None:
        if isinstance(seed, (list, tuple)) and len(seed) != batch:
            raise ParameterError("seed", seed, f"one number or {batch}, one for each picture")
        seeds: list[Any] = list(seed) if isinstance(seed, (list, tuple)) else [seed]
        self._generators = [generator(kind, one) for one in seeds]

    @property
    def single(self) -> bool:
        """Whether one generator draws for every picture."""
        return len(self._generators) == 1

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next standard normal values: (pictures, ...), float32; of the first generators where there are more."""
        if self.single:
            return self._generators[0].randn(shape)
        return np.concatenate([one.randn((1, *shape[1:])) for one in self._generators[: shape[0]]])


class TorchGenerator:
    """A stream of draws equal to those of ``torch.Generator("cpu").manual_seed(seed)``.

    Normals agree with PyTorch's to the last float32 bit or two: logarithm and cosine differ there by that much.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(_checked(seed) & 0xFFFFFFFF)
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


class PhiloxGenerator:
    """A stream of draws equal to those of ``torch.Generator("cuda").manual_seed(seed)``.

    Normals agree to the last float32 bit or two. Where a draw has more values than the GPU has resident threads (some
    200,000 on data centre GPUs), PyTorch lets each thread draw several, and the values depend on the GPU; here they are
    always those of a GPU that is large enough.
    """

    def __init__(self, seed: int) -> None:
        seed = _checked(seed) & (2**64 - 1)
        self._key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64)
        self._draws = 0

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal values, float32; the same as ``torch.randn(shape, generator=..., device="cuda")``."""
        counter = np.zeros((4, math.prod(shape)), np.uint64)
        counter[0] = self._draws
        counter[2] = np.arange(counter.shape[1])
        self._draws += 1
        words = philox4x32(counter, self._key)
        # curand's uniforms, in (0, 1] and (0, 2 pi]
        u = words[0].astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
        v = words[1].astype(np.float32) * np.float32(2.0**-31 * np.pi) + np.float32(2.0**-32 * np.pi)
        normal: NDArray[np.float32] = np.sqrt(np.float32(-2) * np.log(u)) * np.sin(v)
        return normal.reshape(shape)


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), 32-bit words.

    Args:
        counter: (4, n).
        key: (2,).
    """
    low = np.uint64(0xFFFFFFFF)
    a, b, c, d = counter
    for turn in range(10):
        key_0, key_1 = (key + np.uint64(turn) * np.array([0x9E3779B9, 0xBB67AE85], np.uint64)) & low
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (second >> 32) ^ b ^ key_0, second & low, (first >> 32) ^ d ^ key_1, first & low
    return np.stack([a, b, c, d])


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not -(2**63) <= seed < 2**64:
        raise ParameterError("seed", seed, "a whole number from -2^63 to 2^64 - 1")
    return int(seed)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    u1, u2 = np.split(uniform.reshape(-1, _BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u1))
    angle = np.float32(2 * np.pi) * u2
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
