"""How well a picture follows the scene that controlled it: its outline, and the colours that its prompt names.

Shape IoU compares the scene's filled silhouette with the picture's foreground: the pixels closer to the named
colour than to the colour of the picture's border. Colours are right when the median colour over the shapes,
and over the background, is nearest to the named colour among the palette.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from controlrt.demo.scenes import PALETTE, Scene

BORDER = 0.03  # nothing is drawn this close to the border, so it shows the background's colour
EDGE = 9 / 512  # of the side: what lies across an outline has neither colour


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one picture."""

    iou: float
    shape_colour: bool
    background_colour: bool

    @property
    def both_colours(self) -> bool:
        """Whether all that the prompt names is right."""
        return self.shape_colour and self.background_colour


def foreground(picture: NDArray[np.uint8], colour: str) -> NDArray[np.bool_]:
    """Pixels of the picture that belong to shapes: (height, width).

    The background's colour is the median over the border; a pixel is foreground where it is closer to the named
    colour than to that.
    """
    values = picture.astype(np.float32)
    width = max(2, round(BORDER * len(picture)))
    ring = np.ones(picture.shape[:2], bool)
    ring[width:-width, width:-width] = False
    background = np.median(values[ring], axis=0)
    to_background = np.linalg.norm(values - background, axis=-1)
    to_colour = np.linalg.norm(values - np.float32(PALETTE[colour]), axis=-1)
    nearer: NDArray[np.bool_] = to_colour < to_background
    return nearer


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def nearest_colour(pixels: NDArray[np.uint8]) -> str:
    """Name of the palette colour nearest to the median of (n, 3) pixels."""
    median = np.median(pixels.astype(np.float32), axis=0)
    return min(PALETTE, key=lambda name: float(np.linalg.norm(median - np.float32(PALETTE[name]))))


def score(scene: Scene, picture: NDArray[np.uint8]) -> Score:
    """Measures of one square picture against the scene that it was controlled by."""
    silhouette = scene.silhouette(len(picture))
    edge = max(1, round(EDGE * len(picture)))
    kernel = np.ones((edge, edge), np.uint8)
    inside = cv2.erode(silhouette.astype(np.uint8), kernel).astype(bool)
    outside = ~cv2.dilate(silhouette.astype(np.uint8), kernel).astype(bool)
    return Score(
        iou=iou(silhouette, foreground(picture, scene.colour)),
        shape_colour=nearest_colour(picture[inside]) == scene.colour,
        background_colour=nearest_colour(picture[outside]) == scene.background,
    )
