"""Annotators that are a formula of pixels, against it; they need no OpenCV."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from controlrt.runtime.annotators import annotate
from controlrt.runtime.pictures import to_hint, to_rgb
from sample_pictures import MODES, SIZES, in_mode, noise

PIXELS = arrays.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)))


@given(PIXELS, st.floats(0, 255))
@settings(max_examples=50, deadline=None)
def test_formulas(pixels: np.ndarray, threshold: float) -> None:
    picture = Image.fromarray(pixels)
    np.testing.assert_array_equal(annotate("none", picture), pixels)
    np.testing.assert_array_equal(annotate("invert", picture), 255 - pixels.astype(int))
    white = np.where((pixels > threshold).all(axis=2), 255, 0)
    for given_as in ({"threshold": threshold}, {"threshold_a": threshold}, {"threshold_a": str(threshold)}):
        found = np.asarray(annotate("binary", pixels, **given_as))
        np.testing.assert_array_equal(found, np.stack([white] * 3, axis=2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_picture(mode: str, size: tuple[int, int]) -> None:
    picture = in_mode(noise(*size), mode)
    expected = np.asarray(to_rgb(picture))
    np.testing.assert_array_equal(annotate("tile", picture), expected)
    np.testing.assert_array_equal(annotate("invert", picture), 255 - expected)


@given(PIXELS, st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_inpainting_is_what_diffusers_prepares(pixels: np.ndarray, seed: int) -> None:
    """As in diffusers' documentation of control_v11p_sd15_inpaint: a float picture, -1 where the mask is above 0.5."""
    mask = np.random.default_rng(seed).integers(0, 256, pixels.shape[:2], np.uint8)
    expected = pixels.astype(np.float32) / 255.0
    expected[mask.astype(np.float32) / 255.0 > 0.5] = -1.0
    hint = annotate("inpaint", Image.fromarray(pixels), Image.fromarray(mask))
    assert hint.dtype == np.float32
    np.testing.assert_array_equal(hint, expected)
    np.testing.assert_array_equal(annotate("inpaint_only", pixels, mask > 127), expected)
    height, width = mask.shape
    np.testing.assert_array_equal(to_hint(hint, width, height, "inpaint"), expected.transpose(2, 0, 1))


def test_inpainting_at_another_size_keeps_the_mask_whole() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30] = 255
    picture = np.full((40, 40, 3), 128, np.uint8)
    hint = annotate("inpaint", picture, mask, width=80, height=80)
    assert hint.shape == (80, 80, 3)
    np.testing.assert_array_equal((hint == -1).all(axis=2), (hint == -1).any(axis=2))
    masked = hint[..., 0] == -1
    assert masked[20:60, 20:60].all()
    assert masked.sum() == 40 * 40
    np.testing.assert_allclose(hint[~masked], 128 / 255, atol=1e-5)  # nothing of the hole in the colours
    wide = annotate("inpaint", picture, mask, width=120, height=80, resize_mode="Resize and Fill")
    assert (wide[:, :20] == -1).all()  # what is added outside is to be painted
    assert (wide[:, -20:] == -1).all()
    assert (wide[0, 20:100] != -1).all()
    black = annotate("inpaint", picture, mask, width=120, height=80, resize_mode="pad")
    assert (black[:, :20] == 0).all()


def test_the_size_asked_for() -> None:
    pixels = noise(30, 50)
    for mode, size in (("stretch", (64, 64)), (0, (20, 90)), ("Crop and Resize", (31, 17)), ("pad", (50, 30))):
        made = annotate("none", pixels, width=size[0], height=size[1], resize_mode=mode)
        assert made.size == size
    np.testing.assert_array_equal(annotate("none", pixels, width=50, height=30), pixels)
