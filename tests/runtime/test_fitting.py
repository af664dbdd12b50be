"""Resize modes by every name, the resolution they ask for, and where the pixels land."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from controlrt.runtime.errors import UnknownNameError
from controlrt.runtime.fitting import RESIZES, border_colour, fit, fit_masked, pixel_perfect_resolution, resize_named
from sample_pictures import scene


@pytest.mark.parametrize(
    ("names", "mode"),
    [
        (("stretch", "Just Resize", "just resize", 0, "0"), "stretch"),
        (("crop", "Crop and Resize", "Inner Fit (Scale to Fit)", "Scale to Fit (Inner Fit)", 1, " CROP "), "crop"),
        (("fill", "Resize and Fill", "Outer Fit (Shrink to Fit)", "Envelope (Outer Fit)", 2, "2"), "fill"),
        (("pad", "Pad"), "pad"),
    ],
)
def test_names(names: tuple[str | int, ...], mode: str) -> None:
    assert {resize_named(name) for name in names} == {mode}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("Crop & Resize", "did you mean 'Crop and Resize'"),
        (3, "or 0, 1, 2"),
        (True, "unknown resize mode"),
        (-1, "known: stretch, crop, pad, fill, Just Resize"),
    ],
)
def test_unknown_names(wrong: str | int, says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        resize_named(wrong)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(64, 2048), st.integers(64, 2048))
def test_pixel_perfect_is_the_extensions_formula(w: int, h: int, width: int, height: int) -> None:
    """ControlNet's extension: k0 = H / h, k1 = W / w, the smaller for "Resize and Fill", times the shorter side."""
    k0, k1 = height / h, width / w
    outer = int(np.round(min(k0, k1) * min(h, w)))
    inner = int(np.round(max(k0, k1) * min(h, w)))
    assert pixel_perfect_resolution((w, h), width, height, "Resize and Fill") == max(1, outer)
    assert pixel_perfect_resolution((w, h), width, height, "pad") == max(1, outer)
    assert pixel_perfect_resolution((w, h), width, height, "Crop and Resize") == inner
    assert pixel_perfect_resolution((w, h), width, height, "Just Resize") == inner


@given(st.sampled_from(RESIZES), st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60))
def test_sizes_and_even_pictures(mode: str, w: int, h: int, width: int, height: int) -> None:
    made = fit(Image.new("RGB", (w, h), (200, 90, 30)), width, height, mode)
    assert made.size == (width, height)
    if mode != "pad":
        assert (np.asarray(made) == (200, 90, 30)).all()


@pytest.mark.parametrize(("size", "inner"), [((80, 80), (80, 40)), ((20, 81), (20, 10)), ((101, 30), (60, 30))])
def test_fill_is_the_whole_picture_on_the_median_of_its_border(size: tuple[int, int], inner: tuple[int, int]) -> None:
    pixels = scene(40, 80)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = tuple(int(np.median(border[:, channel])) for channel in range(3))
    picture = Image.fromarray(pixels)
    assert border_colour(picture) == colour
    made = np.asarray(fit(picture, *size, "Resize and Fill"))
    left, top = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    expected = np.full((size[1], size[0], 3), colour, np.uint8)
    scaled = picture.resize(inner, Image.Resampling.LANCZOS)
    expected[top : top + inner[1], left : left + inner[0]] = np.asarray(scaled)
    np.testing.assert_array_equal(made, expected)


def test_crop_keeps_the_middle_and_stretch_the_whole() -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, :40, 0] = pixels[:, 40:80, 1] = pixels[:, 80:, 2] = 255
    picture = Image.fromarray(pixels)
    middle = np.asarray(fit(picture, 20, 20, 1))
    assert middle.shape == (20, 20, 3)
    assert (middle[:, 4:-4] == (0, 255, 0)).all()
    assert (np.asarray(fit(picture, 30, 20, 0))[:, [4, 15, 25]] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]).mean() > 0.9
    padded = np.asarray(fit(picture, 60, 60, "pad"))
    assert not padded[:19].any()
    assert padded[30].any(axis=-1).all()


@pytest.mark.parametrize("mode", RESIZES)
def test_what_is_masked_has_no_share_in_the_colours_around(mode: str) -> None:
    pixels = scene(48, 64)
    hole = np.zeros((48, 64), np.bool_)
    hole[12:30, 20:50] = True
    black = np.where(hole[..., None], 0, pixels)
    colours, mask = fit_masked(Image.fromarray(black.astype(np.uint8)), hole, 100, 90, mode)
    assert colours.shape == (90, 100, 3)
    assert mask.shape == (90, 100)
    whole = np.asarray(fit(Image.fromarray(pixels), 100, 90, mode), np.float32) / 255
    fitted = fit(Image.fromarray(np.where(hole, 255, 0).astype(np.uint8)), 100, 90, "pad" if mode == "fill" else mode)
    near = np.asarray(fitted)
    far = ~mask & (near == 0)
    assert np.abs(colours - whole)[far].mean() < 0.01
    edge = ~mask & (near > 0)
    assert edge.any()
    assert np.abs(colours - whole)[edge].mean() < 0.1
    outside = np.r_[0:7, 83:90]  # the picture becomes 75 high
    if mode == "fill":
        assert mask[outside].all()
    if mode == "pad":
        assert not mask[outside].any()
        assert not colours[outside].any()
