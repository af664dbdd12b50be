"""Drawings as control pictures: filled outlines against SciPy's filling of holes, then the annotators."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

cv2 = pytest.importorskip("cv2", reason="annotators need the extra [annotate]")

from controlrt.runtime.annotators import annotate  # noqa: E402
from controlrt.runtime.errors import PictureError  # noqa: E402
from controlrt.runtime.server.ui.control_picture import (  # noqa: E402
    control_picture,
    example_outline,
    fill_outlines,
    flatten,
)

SIDE = 256


def circle(draw: ImageDraw.ImageDraw, ink: str) -> None:
    draw.ellipse((40, 60, 180, 200), outline=ink, width=5)


def two_shapes(draw: ImageDraw.ImageDraw, ink: str) -> None:
    draw.rectangle((20, 20, 90, 120), outline=ink, width=4)
    draw.polygon([(150, 240), (240, 240), (200, 140)], outline=ink, width=3)


def nested(draw: ImageDraw.ImageDraw, ink: str) -> None:
    circle(draw, ink)
    draw.rectangle((90, 110, 130, 150), outline=ink, width=3)


def at_the_border(draw: ImageDraw.ImageDraw, ink: str) -> None:
    draw.rectangle((0, 80, 100, 200), outline=ink, width=4)


def paper(draw_on: Callable[[ImageDraw.ImageDraw, str], None], ink: str, background: str) -> np.ndarray:
    picture = Image.new("RGB", (SIDE, SIDE), background)
    draw_on(ImageDraw.Draw(picture), ink)
    return np.asarray(picture)


@pytest.mark.parametrize(("ink", "background"), [("black", "white"), ("white", "black"), ("blue", "lightyellow")])
@pytest.mark.parametrize("shape", [circle, two_shapes, nested, at_the_border])
def test_closed_outlines_are_filled_as_scipy_fills_holes(
    shape: Callable[[ImageDraw.ImageDraw, str], None], ink: str, background: str
) -> None:
    morphology = pytest.importorskip("scipy.ndimage")
    picture = paper(shape, ink, background)
    expected = morphology.binary_fill_holes((picture != picture[-1, -1]).any(axis=2))
    filled = fill_outlines(picture)
    assert filled.shape == picture.shape
    assert filled.dtype == np.uint8
    assert set(np.unique(filled)) == {0, 255}
    np.testing.assert_array_equal(filled[..., 0] == 255, expected)


@pytest.mark.parametrize(("gap", "closes"), [(0, True), (4, True), (90, False)])
def test_small_gaps_are_closed_and_large_ones_are_not(gap: int, closes: bool) -> None:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).arc((40, 40, 200, 200), gap, 360, fill="black", width=5)
    disc = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(disc).ellipse((40, 40, 200, 200), fill=1)
    area = (fill_outlines(np.asarray(picture))[..., 0] == 255).sum() / np.asarray(disc).sum()
    assert area > 0.98 if closes else area < 0.2


def test_filling_keeps_concave_corners() -> None:
    """The star's own outline, not its closing."""
    layer = example_outline(512, 512)
    filled = fill_outlines(np.asarray(flatten(layer)))[..., 0] == 255
    ink = np.asarray(layer)[..., 3] > 0
    radius = 0.36 * 512
    inner = [
        (256 + radius * reach * math.cos(angle), 256 + radius * reach * math.sin(angle))
        for corner in range(10)
        for reach, angle in [((0.45 if corner % 2 else 1.0), math.pi * (corner / 5 - 0.5))]
    ]
    polygon = Image.new("1", (512, 512))
    ImageDraw.Draw(polygon).polygon(inner, fill=1)
    expected = np.asarray(polygon) | ink
    assert (filled != expected).sum() < 50


@pytest.mark.parametrize(
    ("drawn", "says"),
    [
        (None, "there is no picture yet"),
        (Image.new("RGBA", (64, 64)), "nothing is drawn yet"),
        (Image.new("RGB", (64, 64), "white"), "nothing is drawn yet"),
    ],
)
def test_says_that_there_is_nothing(drawn: Image.Image | None, says: str) -> None:
    with pytest.raises(PictureError, match=says):
        flatten(drawn)


@pytest.mark.parametrize("annotator", ["none", "canny", "invert"])
def test_annotators_see_the_filled_drawing(annotator: str) -> None:
    drawn = example_outline(128, 128)
    made = control_picture(drawn, fill=True, annotator=annotator, values={}, width=128, height=128, resize="crop")
    filled = Image.fromarray(fill_outlines(np.asarray(flatten(drawn))))
    np.testing.assert_array_equal(np.asarray(made), np.asarray(annotate(annotator, filled)))


def test_parameters_and_sizes_are_those_asked_for() -> None:
    photo = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8))
    given = {"fill": False, "annotator": "threshold", "width": 64, "height": 128}
    dark, light = (
        np.asarray(control_picture(photo, values={"threshold": level}, resize="stretch", **given))
        for level in (30, 200)
    )
    assert dark.shape == light.shape == (128, 64, 3)
    assert dark.mean() > light.mean()
