from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("fastapi")

import sample_pictures
from controlrt.runtime.server.automatic1111.repainting import (
    Masking,
    fill,
    flatten,
    prepare,
    read_mask,
    region,
    resize,
)

SCENE = Image.fromarray(sample_pictures.scene(96, 128))


def mask_of(*box: int, size: tuple[int, int] = (128, 96)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def test_transparency_shows_white() -> None:
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(np.asarray(flatten(clear)), [[(255, 255, 255), (10, 20, 30)]])
    assert flatten(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_a_mask_is_its_transparency_or_its_brightness() -> None:
    painted = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    painted.putpixel((1, 0), (0, 0, 0, 200))
    np.testing.assert_array_equal(np.asarray(read_mask(painted)), [[0, 255]])
    assert read_mask(Image.new("RGBA", (1, 1), (255, 255, 255, 255))).getpixel((0, 0)) == 255
    assert read_mask(Image.new("RGB", (1, 1), (0, 0, 0))).getpixel((0, 0)) == 0


def test_resize_and_fill_draws_the_outermost_pixels_out() -> None:
    wide = np.asarray(resize(SCENE, 2, 256, 96))
    np.testing.assert_array_equal(wide[:, 64:192], np.asarray(SCENE))
    np.testing.assert_array_equal(wide[:, :64], np.repeat(wide[:, 64:65], 64, axis=1))
    np.testing.assert_array_equal(wide[:, 192:], np.repeat(wide[:, 191:192], 64, axis=1))
    tall = np.asarray(resize(SCENE.convert("L"), 2, 128, 100))
    np.testing.assert_array_equal(tall[0], tall[2])


def test_the_other_modes_stretch_and_crop() -> None:
    assert resize(SCENE, 0, 64, 64).size == (64, 64)
    cropped = resize(SCENE, 1, 96, 96)
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(SCENE)[:, 16:112])


@given(st.tuples(*[st.integers(0, 60)] * 2), st.tuples(*[st.integers(1, 60)] * 2), st.integers(0, 40))
def test_region_holds_the_mask_and_has_the_proportions(
    corner: tuple[int, int], size: tuple[int, int], padding: int
) -> None:
    box = (corner[0], corner[1], min(corner[0] + size[0], 128), min(corner[1] + size[1], 96))
    left, top, right, lower = found = region(mask_of(*box), padding, 64, 64) or (0, 0, 0, 0)
    assert left <= box[0]
    assert top <= box[1]
    assert right >= box[2]
    assert lower >= box[3]
    assert min(found) >= 0
    assert right <= 128
    assert lower <= 96
    if right - left != lower - top:  # then there was no room
        assert lower - top == 96 or right - left == 128


def test_region_of_nothing() -> None:
    assert region(Image.new("L", (8, 8)), 4, 64, 64) is None


def test_fill_paints_the_inside_with_the_colours_around_it() -> None:
    picture = Image.new("RGB", (64, 64), (200, 40, 40))
    picture.paste((0, 0, 255), (20, 20, 40, 40))
    filled = np.asarray(fill(picture, mask_of(18, 18, 42, 42, size=(64, 64)))).astype(int)
    assert np.abs(filled - (200, 40, 40)).max() <= 8  # premultiplied colours are rounded
    outside = np.asarray(fill(SCENE, mask_of(40, 40, 60, 60)))
    np.testing.assert_array_equal(outside[:30], np.asarray(SCENE)[:30])


@pytest.mark.parametrize("alone", [False, True])
def test_outside_of_the_mask_the_result_is_the_original(alone: bool) -> None:
    masking = Masking(blur=(0, 0), alone=alone, padding=8)
    made = prepare(SCENE, mask_of(40, 40, 60, 60), masking, 0, 128, 96)
    drawn = made.finish(Image.new("RGB", (128, 96), (1, 2, 3)))
    pixels = np.asarray(drawn)
    assert (pixels[40:60, 40:60] == (1, 2, 3)).all()
    outside = np.ones((96, 128), bool)
    outside[40:60, 40:60] = False
    np.testing.assert_array_equal(pixels[outside], np.asarray(SCENE)[outside])
    assert (made.crop is not None) == alone
    assert made.mask is not None
    assert made.mask.size == made.picture.size == (128, 96)


def test_a_mask_can_be_inverted_and_blurred() -> None:
    made = prepare(SCENE, mask_of(0, 0, 64, 96), Masking(invert=True, blur=(2, 0), alone=False), 0, 128, 96)
    assert made.mask is not None
    row = np.asarray(made.mask)[48]
    assert (row[:50] == 0).all()
    assert (row[80:] == 255).all()
    assert ((row > 0) & (row < 255)).any()


def test_content_may_be_kept_inside_of_the_mask() -> None:
    kept = prepare(SCENE, mask_of(40, 40, 60, 60), Masking(filled=False, alone=False), 0, 128, 96)
    np.testing.assert_array_equal(np.asarray(kept.picture), np.asarray(SCENE))


def test_where_nothing_is_masked_all_of_it_is_drawn() -> None:
    made = prepare(SCENE, Image.new("L", (128, 96)), Masking(), 0, 128, 96)
    assert (made.mask, made.crop) == (None, None)
    whole = Image.new("RGB", (128, 96), "red")
    assert made.finish(whole) is whole
