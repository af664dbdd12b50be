"""The VAE in tiles, with a VAE that works on each pixel by itself: tiles of that are exact."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.vae import Vae, check_vae_tiling

FACTOR, TILE = 8, 256


class PixelVae:
    """Decodes a latent to a square of its first three channels; encodes a square to its mean and half of it."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def run(self, program: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        (array,) = inputs.values()
        self.sizes.append(array.shape)
        if program == "vae_decoder":
            return {"picture": array[:, :3].repeat(FACTOR, 2).repeat(FACTOR, 3).transpose(0, 2, 3, 1)}
        _, height, width, _ = array.shape
        squares = array.reshape(1, height // FACTOR, FACTOR, width // FACTOR, FACTOR, 3).mean((2, 4))
        mean = squares.transpose(0, 3, 1, 2)
        return {"mean": mean, "std": mean / 2}


def vae(runner: PixelVae, tile: int | None = TILE) -> Vae:
    profile = ShapeProfile.parse("1024x1024", vae_tile=tile)
    return Vae(SimpleNamespace(model=SimpleNamespace(vae_scale_factor=FACTOR), profile=profile), runner)  # type: ignore[arg-type]


sides = st.integers(1, 12).map(lambda blocks: 64 * blocks)


@settings(max_examples=25, deadline=None)
@given(width=sides, height=sides)
def test_tiles_make_the_whole(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    latents = rng.random((1, 4, height // FACTOR, width // FACTOR), np.float32) * 3 - 1
    runner = PixelVae()
    found = vae(runner).decode(latents)
    whole = PixelVae().run("vae_decoder", {"latents": latents})["picture"]
    np.testing.assert_allclose(found, np.clip(whole, 0, 1), atol=1e-6)
    assert all(side % 8 == 0 and side <= TILE // FACTOR for size in runner.sizes for side in size[2:])
    assert (len(runner.sizes) == 1) == (max(width, height) <= TILE)

    picture = rng.random((1, height, width, 3), np.float32)
    mean, std = vae(PixelVae()).encode(picture)
    expected = PixelVae().run("vae_encoder", {"picture": picture})
    np.testing.assert_allclose(mean, expected["mean"], atol=1e-6)
    np.testing.assert_allclose(std, expected["std"], atol=1e-6)


def test_a_whole_vae_takes_whole_pictures() -> None:
    runner = PixelVae()
    vae(runner, tile=None).encode(np.ones((1, 512, 512, 3), np.float32))
    assert runner.sizes == [(1, 512, 512, 3)]


def test_tiles_where_there_are_none() -> None:
    profile = ShapeProfile.parse("512x512")
    check_vae_tiling(profile, 512, 512, False)
    with pytest.raises(ParameterError, match="build-engines --vae-tile 512"):
        check_vae_tiling(profile, 512, 512, True)


def test_no_tiles_where_they_are_needed() -> None:
    profile = ShapeProfile.parse("512x512", vae_tile=256)
    check_vae_tiling(profile, 256, 256, False)
    check_vae_tiling(profile, 512, 256, True)
    with pytest.raises(ParameterError, match=r"True \(--vae-tiling\) for 256x320: .* at most 256x256 at once"):
        check_vae_tiling(profile, 256, 320, False)


@pytest.mark.parametrize("side", [0, 64, 300, 8192])
def test_tiles_of_another_side(side: int) -> None:
    with pytest.raises(ParameterError, match="a multiple of 256 up to 4096"):
        ShapeProfile.parse("512x512", vae_tile=side)
