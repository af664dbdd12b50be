"""The VAE, in tiles where a picture is larger than it takes at once, as diffusers' ``enable_vae_tiling`` has it.

Tiles overlap by a quarter. Each is the VAE's answer to its part alone, so the statistics of its norms and its attention
are the tile's own: the result differs from that of the whole picture, by little where pictures are even. Over the
overlap a tile fades into the next one linearly, from above first and then from the left.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import NotFiniteError, ParameterError
from controlrt.runtime.executors import Runner
from controlrt.runtime.executors.base import DECODER, ENCODER
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.profile import ShapeProfile

Array = NDArray[np.float32]
OVERLAP = 0.25
"""Of a tile's side, with the next one."""


def check_vae_tiling(profile: ShapeProfile, width: int, height: int, vae_tiling: bool) -> None:
    """Raises ParameterError where tiles are asked for and the bundle has none, or needed and not asked for."""
    tile = profile.vae_tile
    if tile is None:
        if vae_tiling:
            allowed = "left out: this bundle's VAE takes whole pictures; for tiles: build-engines --vae-tile 512"
            raise ParameterError("vae_tiling", vae_tiling, allowed)
    elif max(width, height) > tile and not vae_tiling:
        allowed = f"True (--vae-tiling) for {width}x{height}: this bundle's VAE takes at most {tile}x{tile} at once"
        raise ParameterError("vae_tiling", vae_tiling, allowed)


def check_finite(latents: Array) -> None:
    """Raises NotFiniteError where a decoder would make a black picture of ``latents``."""
    if not np.isfinite(latents).all():
        raise NotFiniteError


class Vae:
    """The VAE's programs outside of plans, which have the decoder of whole pictures in them.

    Args:
        manifest: the bundle's.
        runner: what runs its programs.
    """

    def __init__(self, manifest: Manifest, runner: Runner) -> None:
        self._runner, self._factor = runner, manifest.model.vae_scale_factor
        self.tile = manifest.profile.vae_tile
        """Side of a tile, in pixels; None where the VAE takes whole pictures."""

    def encode(self, picture: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of a picture's latents, (1, channels, height/8, width/8) each.

        In tiles, what fades is the mean and the logarithm of the deviation.

        Args:
            picture: (1, height, width, 3), float32 in [0, 1].
        """
        if self.tile is None:
            return self._encode(picture)

        def moments(part: Array) -> Array:
            mean, std = self._encode(part.transpose(0, 2, 3, 1))
            return np.concatenate([mean, np.log(std)], axis=1)

        made = _in_tiles(moments, picture.transpose(0, 3, 1, 2), self.tile, self.tile // self._factor)
        mean, log_std = np.split(made, 2, axis=1)
        return mean, np.exp(log_std)

    def decode(self, latents: Array) -> Array:
        """Pictures, (batch, height, width, 3) in [0, 1].

        Args:
            latents: (batch, channels, height/8, width/8), float32.
        """
        return np.concatenate([self._decode(row[None]) for row in latents])  # one at a time, to keep memory flat

    def _encode(self, picture: Array) -> tuple[Array, Array]:
        encoded = self._runner.run(ENCODER, {"picture": np.ascontiguousarray(picture)})
        return encoded["mean"], encoded["std"]

    def _decode(self, latents: Array) -> Array:
        if self.tile is None:
            return self._runner.run(DECODER, {"latents": latents})["picture"]

        def decoded(part: Array) -> Array:
            return self._runner.run(DECODER, {"latents": part})["picture"].transpose(0, 3, 1, 2)

        picture = _in_tiles(decoded, latents, self.tile // self._factor, self.tile)
        return np.clip(picture.transpose(0, 2, 3, 1), 0, 1)


def _in_tiles(run: Callable[[Array], Array], source: Array, tile: int, made_tile: int) -> Array:
    """``run`` on tiles of ``source``, joined. Height and width are the last two axes.

    Args:
        run: makes of (..., h, w) what is ``made_tile / tile`` times as large.
        source: the whole.
        tile, made_tile: sides of a tile of the source, and of what is made of it.
    """
    if max(source.shape[-2:]) <= tile:
        return run(source)
    step = int(tile * (1 - OVERLAP))
    extent = int(made_tile * OVERLAP)
    kept = made_tile - extent
    rows: list[Array] = []
    above: list[Array] = []
    for top in range(0, source.shape[-2], step):
        row: list[Array] = []
        for column, left in enumerate(range(0, source.shape[-1], step)):
            made = np.array(run(np.ascontiguousarray(source[..., top : top + tile, left : left + tile])))
            if above:
                _fade(above[column], made, extent, -2)
            if row:
                _fade(row[-1], made, extent, -1)
            row.append(made)
        rows.append(np.concatenate([made[..., :kept, :kept] for made in row], axis=-1))
        above = row
    return np.concatenate(rows, axis=-2)


def _fade(before: Array, after: Array, extent: int, axis: int) -> None:
    """Has ``after`` begin as ``before`` ends, over ``extent`` pixels of ``axis``."""
    before, after = np.moveaxis(before, axis, -1), np.moveaxis(after, axis, -1)
    extent = min(before.shape[-1], after.shape[-1], extent)
    share = np.arange(extent, dtype=np.float32) / np.float32(extent)
    after[..., :extent] = before[..., -extent:] * (1 - share) + after[..., :extent] * share
