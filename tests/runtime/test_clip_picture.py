"""CLIP's view of a picture against transformers' own processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from controlrt.runtime.clip_picture import clip_picture
from controlrt.runtime.errors import PictureError


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", [(224, 224), (300, 500), (501, 333), (40, 61), (100, 99), (1200, 225)])
@pytest.mark.parametrize("side", [224, 336])
def test_it_is_that_of_transformers(size: tuple[int, int], side: int) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(size=side, crop_size=side)
    for mode in ("RGB", "L"):
        expected = processor(picture(*size, mode), return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(clip_picture(picture(*size, mode), side, "it"), expected, atol=1e-6, rtol=0)


def test_arrays_are_pictures() -> None:
    array = np.asarray(picture(50, 40))
    expected = clip_picture(picture(50, 40), 32, "it")
    np.testing.assert_array_equal(clip_picture(array, 32, "it"), expected)
    np.testing.assert_array_equal(clip_picture(array / np.float32(255), 32, "it"), expected)


def test_a_strip_is_refused() -> None:
    with pytest.raises(PictureError, match=r"the style is 8x500, more than 50 times as long as wide; cut out"):
        clip_picture(picture(8, 500), 32, "the style")
