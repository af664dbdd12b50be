from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controlrt.runtime.canvas import Canvas, Source, prepare_canvas, read_source, run_strength
from controlrt.runtime.errors import ParameterError, PictureError
from controlrt.runtime.manifest import Model
from controlrt.runtime.noise import Draws
from controlrt.runtime.samplers import compile_sampler

SIDE, LATENTS = 64, (2, 4, 8, 8)
PICTURE = np.random.default_rng(0).random((SIDE, SIDE, 3), np.float32)
MASK = np.zeros((SIDE, SIDE), np.uint8)
MASK[8:24, :] = 255
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def read(init_image: Any, mask_image: Any = None, **changes: Any) -> Source | None:
    sizes = {"strength": None, "latents": LATENTS, "width": SIDE, "height": SIDE, "prompts": 2, "resize": None}
    return read_source(init_image, mask_image, **{**sizes, **changes})


@pytest.mark.parametrize(
    ("source", "mask", "strength", "expected"),
    [
        (False, False, None, None),
        (True, False, None, 0.8),
        (True, False, 1.0, 1.0),
        (True, True, None, None),
        (True, True, 1.0, None),
        (True, True, 0.4, 0.4),
    ],
)
def test_strength_of_each_task(source: bool, mask: bool, strength: float | None, expected: float | None) -> None:
    assert run_strength(source, mask, strength) == expected


def test_pictures_and_masks_are_read() -> None:
    source = read([PICTURE, PICTURE[::-1]], MASK)
    assert source is not None
    np.testing.assert_array_equal(source.pictures, [PICTURE, PICTURE[::-1]])
    np.testing.assert_array_equal(source.masks, [MASK / 255])
    assert read(None) is None


def test_one_picture_for_each_that_is_drawn() -> None:
    """As the second pass of hires fix gives them, where a prompt has several pictures."""
    several = [PICTURE, PICTURE[::-1], PICTURE, PICTURE[::-1]]
    source = read(several, latents=(4, *LATENTS[1:]), prompts=1)
    assert source is not None
    np.testing.assert_array_equal(source.pictures, several)


@pytest.mark.parametrize("level", [0, 127, 128, 255])
def test_a_mask_is_cut_at_one_half(level: int) -> None:
    source = read(PICTURE, np.full((SIDE, SIDE), level, np.uint8))
    assert source is not None
    assert source.masks is not None
    assert source.masks.min() == source.masks.max() == (level >= 128)


@pytest.mark.parametrize(
    ("init_image", "mask_image", "changes", "error", "says"),
    [
        (None, MASK, {}, ParameterError, "mask_image.*no init_image"),
        (None, None, {"strength": 0.5}, ParameterError, "strength is 0.5.*no init_image"),
        (PICTURE[:32], None, {}, PictureError, "init_image is 64x32, the output is 64x64.*resize"),
        (PICTURE, MASK[:, :32], {}, PictureError, "mask_image is 32x64"),
        ([PICTURE] * 3, None, {}, PictureError, "3 pictures for 2 prompts; give 1 or 2$"),
        (PICTURE, [MASK] * 3, {}, PictureError, "mask_image has 3 pictures"),
        ("a.png", None, {}, PictureError, r"init_image is the text 'a.png', .*PIL.Image.open\('a.png'\)"),
        (PICTURE, Path("a.png"), {}, PictureError, "mask_image is the text 'a.png', not a picture"),
        (PICTURE * 2, None, {}, PictureError, "outside 0..1"),
        (np.zeros((2, 4, 8, 9)), None, {}, ParameterError, "(2, 4, 8, 8)"),
        (np.zeros((3, 4, 8, 8)), None, {}, ParameterError, "latents of shape"),
        (np.full(LATENTS, np.inf), None, {}, ParameterError, "finite"),
        (np.zeros(LATENTS), MASK, {}, ParameterError, "a picture where there is a mask_image"),
    ],
)
def test_refusals(init_image: Any, mask_image: Any, changes: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says.replace("(", r"\(").replace(")", r"\)") if "latents" in says else says):
        read(init_image, mask_image, **changes)


def canvas(source: Source | None, seed: Any = 5, *, strength: float | None = 0.5, sees_mask: bool = False) -> Canvas:
    model = Model(source="", latent_channels=4, vae_scale_factor=8, time_ids=False, zero_empty_negative=False)

    def encode(picture: Any) -> Any:
        """Means of 8x8 blocks, in four channels; a standard deviation of one."""
        blocks = picture.reshape(1, 8, 8, 8, 8, 3).mean(axis=(2, 4))
        mean = np.concatenate([blocks, blocks[..., :1]], axis=-1).transpose(0, 3, 1, 2).astype(np.float32)
        return mean, np.ones_like(mean)

    return prepare_canvas(
        model,
        source,
        compile_sampler("DDIM", CONFIG, 10, strength=strength),
        Draws(seed, LATENTS[0]),
        encode,
        LATENTS,
        None,
        pure_noise=strength is None,
        sees_mask=sees_mask,
    )


def test_a_seed_for_every_picture_draws_for_its_own() -> None:
    """So a picture is the same alone and in any company."""
    source = read(PICTURE)
    together = canvas(source, [5, 6]).latents
    for row, seed in enumerate((5, 6)):
        np.testing.assert_array_equal(canvas(source, [seed, 9]).latents[0], together[row])
    assert not np.array_equal(together[0], together[1])


def test_a_mask_comes_to_the_latents_by_nearest_neighbours_and_hides_the_picture() -> None:
    source = read(PICTURE, MASK)
    blended, seen = canvas(source), canvas(source, sees_mask=True)
    assert isinstance(blended.mask, np.ndarray)
    np.testing.assert_array_equal(blended.mask[:, 0], np.broadcast_to(MASK[::8, ::8] / 255, (2, 8, 8)))
    assert blended.inpaint is None
    assert seen.inpaint is not None
    np.testing.assert_array_equal(seen.inpaint[:, :1], blended.mask)
    assert (seen.mask, seen.known) == (1.0, 0.0)
    other = PICTURE.copy()
    other[MASK > 0] = 0.25
    hidden = canvas(read(other, MASK), sees_mask=True, strength=None)
    np.testing.assert_array_equal(hidden.inpaint, canvas(source, sees_mask=True, strength=None).inpaint)  # type: ignore[arg-type]
