"""From what somebody has drawn or uploaded to the control picture of a call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from controlrt.runtime.annotators import ANNOTATORS, Annotator, annotate, annotator_named_in
from controlrt.runtime.errors import PictureError
from controlrt.runtime.fitting import Resize, fit
from controlrt.runtime.manifest import Control

Pixels = NDArray[np.uint8]
PLAIN = "none"
"""The annotator that leaves a picture as it is."""
OFFERED: Mapping[str, Annotator] = {name: each for name, each in ANNOTATORS.items() if not each.needs_mask}
"""Annotators that take one picture and nothing else."""
_CONTRAST = 64
"""How far from the background's luminance ink is, of 255."""


def annotator_for(control: Control) -> str:
    """The annotator that makes pictures for a control, as far as its name and source tell."""
    named = annotator_named_in(control.name, control.source)
    return named if named is not None and named in OFFERED else PLAIN


def flatten(drawn: Image.Image | None) -> Image.Image:
    """A drawing or an upload in RGB; what is transparent is white paper.

    Raises:
        PictureError: there is none, or it has one colour alone.
    """
    if drawn is None:
        raise PictureError("there is no picture yet; draw an outline, or upload a picture")
    layer = drawn.convert("RGBA")
    paper = Image.new("RGBA", layer.size, "white")
    picture = Image.alpha_composite(paper, layer).convert("RGB")
    if picture.getcolors(maxcolors=1):
        raise PictureError("nothing is drawn yet; draw an outline, or upload a picture")
    return picture


def fill_outlines(pixels: Pixels) -> Pixels:
    """White shapes on black: every line with all that it encloses.

    Lines are what differs from the border of the picture in luminance, so dark ones on light paper will do, and light
    ones on dark. An outline that does not quite close is closed over gaps of up to a twentieth of the shorter side.

    Args:
        pixels: (height, width, 3), RGB.

    Returns:
        (height, width, 3), 0 or 255.
    """
    import cv2

    luminance = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY).astype(np.int16)
    border = np.concatenate([luminance[0], luminance[-1], luminance[:, 0], luminance[:, -1]])
    ink = (np.abs(luminance - int(np.median(border))) > _CONTRAST).astype(np.uint8)
    reach = max(3, min(ink.shape) // 20) | 1
    around = cv2.copyMakeBorder(ink, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=0)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    closed = cv2.morphologyEx(around, cv2.MORPH_CLOSE, disc)
    enclosed = _filled(closed) & ~closed & 1  # without what closing adds outside of a line
    shapes = _filled(around | enclosed)[reach:-reach, reach:-reach]
    return np.repeat(shapes[..., None] * np.uint8(255), 3, axis=2)


def _filled(ink: Pixels) -> Pixels:
    """(height, width), 0 or 1: the outer contours of ``ink``, filled."""
    import cv2

    contours, _ = cv2.findContours(ink, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.zeros_like(ink), contours, -1, 1, cv2.FILLED), np.uint8)


def control_picture(
    drawn: Image.Image | None,
    *,
    fill: bool,
    annotator: str,
    values: Mapping[str, Any],
    width: int,
    height: int,
    resize: Resize,
) -> Image.Image:
    """The control picture of a call.

    Args:
        drawn: what is drawn or uploaded; transparent where there is nothing.
        fill: whether closed outlines are filled first.
        annotator: what is made of it then; one of ``OFFERED``.
        values: the annotator's parameters.
        width, height: of the control picture.
        resize: how the picture is fitted to them.

    Returns:
        RGB, width x height.

    Raises:
        PictureError: nothing is drawn.
        UserError: as ``annotate`` raises it.
    """
    picture = flatten(drawn)
    if fill:
        picture = Image.fromarray(fill_outlines(np.asarray(picture)))
    picture = fit(picture, width, height, resize)
    made: Any = annotate(annotator, picture, width=width, height=height, resize_mode=resize, **values)
    return made if isinstance(made, Image.Image) else Image.fromarray(np.asarray(np.rint(made * 255), np.uint8))


def example_outline(width: int, height: int) -> Image.Image:
    """A star of five points in black lines on nothing: what the page shows until somebody draws."""
    layer = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    radius = 0.36 * min(width, height)
    corners = []
    for corner in range(10):
        reach = radius * (0.45 if corner % 2 else 1.0)
        angle = math.pi * (corner / 5 - 0.5)
        corners.append((width / 2 + reach * math.cos(angle), height / 2 + reach * math.sin(angle)))
    ImageDraw.Draw(layer).line([*corners, *corners[:2]], fill="black", width=max(2, min(width, height) // 64))
    return layer
