"""What holds for every annotator and every picture: shape, type, range, and that calls repeat."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlrt.runtime.annotators import ANNOTATORS, annotate
from controlrt.runtime.errors import ParameterError, PictureError
from sample_pictures import MODES, in_mode, noise, scene

pytest.importorskip("cv2", reason="without the extra [annotate] there is no OpenCV")
PICTURES = [name for name, annotator in ANNOTATORS.items() if not annotator.needs_mask]


@given(
    name=st.sampled_from(PICTURES),
    mode=st.sampled_from(MODES),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    resolution=st.sampled_from((0, 1, 16, 33)),
    make=st.sampled_from((noise, scene)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_shape_type_and_repetition(
    name: str, mode: str, height: int, width: int, resolution: int, make: object, seed: int
) -> None:
    picture = in_mode(make(height, width, seed), mode)
    annotator = ANNOTATORS[name]
    given_ = {"processor_res": resolution} if annotator.resizes else {}
    made = np.asarray(annotate(name, picture, **given_))
    assert made.dtype == np.uint8
    if resolution and annotator.resizes:
        ratio = resolution / min(height, width)
        assert made.shape == (max(1, round(height * ratio)), max(1, round(width * ratio)), 3)
        assert min(made.shape[:2]) == resolution
    else:
        assert made.shape == (height, width, 3)
    np.testing.assert_array_equal(made, np.asarray(annotate(name, picture, **given_)))
    sized = annotate(name, picture, width=24, height=16, resize_mode="pad", **given_)
    assert sized.size == (24, 16)


LINES = [name for name in PICTURES if name.startswith(("canny", "scribble", "straight", "softedge", "lineart"))]


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("level", [0, 90, 255])
def test_an_even_picture_has_no_lines(name: str, level: int) -> None:
    assert not np.asarray(annotate(name, np.full((30, 40, 3), level, np.uint8))).any()


@pytest.mark.parametrize("name", LINES)
def test_line_pictures_are_grey_and_see_a_black_bar(name: str) -> None:
    picture = np.full((64, 96, 3), 230, np.uint8)
    picture[30:34, 12:84] = 10
    made = np.asarray(annotate(name, picture))
    assert (made == made[..., :1]).all()
    assert made[20:44].max() > 127
    assert not made[:10].any()


def test_pixel_perfect_works_at_the_resolution_of_the_result() -> None:
    pixels = scene(60, 100)
    for mode, resolution in (("Crop and Resize", 40), ("Just Resize", 40), ("Resize and Fill", 24)):
        automatic = annotate("canny", pixels, width=40, height=40, resize_mode=mode, pixel_perfect=True)
        named = annotate("canny", pixels, width=40, height=40, resize_mode=mode, processor_res=resolution)
        np.testing.assert_array_equal(automatic, named)
    tiled = annotate("tile", pixels, width=40, height=40, pixel_perfect=True)  # has no resolution of its own
    assert tiled.size == (40, 40)


def test_a_resolution_that_makes_too_much_is_refused() -> None:
    with pytest.raises(ParameterError, match="8192x819200"):
        annotate("canny", np.zeros((100, 1, 3), np.uint8), processor_res=8192)


@pytest.mark.parametrize("name", PICTURES)
def test_the_ends_of_every_range_are_usable(name: str) -> None:
    pixels = scene(24, 31)
    for parameter in ANNOTATORS[name].parameters:
        ends = (parameter.minimum, parameter.maximum) if not parameter.choices else parameter.choices
        for value in ends:
            if parameter.name == "processor_res":
                continue  # its range is tried above
            companion = {"threshold_b": 2040} if (name, parameter.name) == ("canny", "threshold_a") else {}
            companion |= {"threshold_a": 0} if (name, parameter.name) == ("canny", "threshold_b") else {}
            made = np.asarray(annotate(name, pixels, **{parameter.name: value}, **companion))
            assert made.dtype == np.uint8
            assert made.shape == ((3, 3, 3) if (name, value) == ("tile_resample", 8) else (24, 31, 3))


def test_a_picture_too_long_to_shuffle_is_refused() -> None:
    with pytest.raises(PictureError, match="40000x1; at most 32766"):
        annotate("shuffle", np.zeros((1, 40000, 3), np.uint8))
