"""Normal maps from depth pictures."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.annotators.annotator import PROCESSOR_RES, Annotator, Parameter, Pixels
from controlrt.runtime.annotators.working_size import at_resolution

FLATNESS = 2 * math.pi
"""The third component before normals are made one long; the value of ControlNet's own normal maps from MiDaS."""


def normal_map(depth: NDArray[np.float32], *, resolution: int, bg_threshold: float, strength: float) -> Pixels:
    """Normals of the surface that a depth picture (white is near) shows: x, y, z in [-1, 1] as red, green, blue.

    x and y are Sobel's derivatives of the depth, white counting 255 * ``strength``, z is 2 pi, and the whole is made
    one long. Where the depth, stretched to 0..1, is below ``bg_threshold``, the surface is taken to be flat.
    """
    import cv2

    working = at_resolution(depth, resolution)
    span = float(working.max() - working.min())
    background = (working - working.min()) / np.float32(span or 1) < bg_threshold
    scaled = np.ascontiguousarray(working, np.float32) * np.float32(255 * strength)
    dx, dy = cv2.Sobel(scaled, cv2.CV_32F, 1, 0), cv2.Sobel(scaled, cv2.CV_32F, 0, 1)
    normal = np.stack([dx, dy, np.full_like(dx, FLATNESS)], axis=2)
    normal[background, :2] = 0
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    return np.clip(normal * 127.5 + 127.5, 0, 255).astype(np.uint8)


NORMAL_MAP = Annotator(
    name="normal_map",
    summary="surface normals from a depth picture, by its gradients",
    function=normal_map,
    aliases=("normal_from_depth",),
    stands_in_for={"normal_midas": {}, "normal_bae": {}},
    takes="depth",
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="threshold_a",
            alias="bg_threshold",
            kind="number",
            default=0.4,
            minimum=0,
            maximum=1,
            help="depth, from 0 at the farthest to 1, below which all is flat background",
        ),
        Parameter(
            name="strength",
            kind="number",
            default=1.0,
            minimum=0,
            maximum=1000,
            help="factor of the depth: steeper slopes",
        ),
    ),
)
