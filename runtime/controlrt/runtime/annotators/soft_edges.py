"""Soft edges and scribbles from gradients: how strong an edge is, quantised, thinned or drawn thick."""

from __future__ import annotations

from math import erf, log, sqrt

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.annotators.annotator import PROCESSOR_RES, Annotator, Parameter, Pixels
from controlrt.runtime.annotators.working_size import at_resolution, three_channels

FILTERS = ("sobel", "scharr", "morphological", "dog")


def edge_strength(pixels: Pixels, kind: str, sigma: float) -> NDArray[np.float32]:
    """(height, width), float32: 0 where the picture is even, 1 at a sharp vertical step from black to white.

    The picture is smoothed by a Gaussian of ``sigma`` first, and the strongest channel counts. ``sobel`` and ``scharr``
    are the length of the gradient by those kernels, ``morphological`` the maximum less the minimum of 3x3 pixels,
    ``dog`` the absolute difference of Gaussians of ``sigma`` (at least 0.5) and 1.6 times it (Marr & Hildreth 1980), by
    the most that continuous ones make of a step; at sigmas below a pixel it can be 1.3.
    """
    import cv2

    channels = pixels.astype(np.float32) / 255
    if kind == "dog":
        inner = max(sigma, 0.5)
        narrow, wide = (cv2.GaussianBlur(channels, (0, 0), one) for one in (inner, 1.6 * inner))
        return _strongest(np.abs(narrow - wide), _dog_of_a_step(inner))
    if sigma > 0:
        channels = cv2.GaussianBlur(channels, (0, 0), sigma)
    if kind == "morphological":
        gradient = cv2.morphologyEx(channels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        return _strongest(gradient, 1)
    derive, weight = (cv2.Sobel, 4) if kind == "sobel" else (cv2.Scharr, 16)
    dx, dy = derive(channels, cv2.CV_32F, 1, 0), derive(channels, cv2.CV_32F, 0, 1)
    return _strongest(np.hypot(dx, dy), weight)


def _strongest(channels: NDArray[np.float32], whole: float) -> NDArray[np.float32]:
    """The largest channel, as a share of ``whole``."""
    return np.asarray(channels.max(axis=2) / np.float32(whole), np.float32)


def _dog_of_a_step(sigma: float) -> float:
    """The largest difference of two Gaussians of ``sigma`` and 1.6 times it on a step from 0 to 1, far from borders.

    It is the difference of two cumulative normal distributions where their densities cross.
    """
    ratio = 1.6
    at = sigma * sqrt(2 * log(ratio) / (1 - ratio**-2))
    return 0.5 * (erf(at / sigma / sqrt(2)) - erf(at / (ratio * sigma) / sqrt(2)))


def soft_edges(
    pixels: Pixels,
    *,
    resolution: int,
    safe_steps: int,
    edge_filter: str,
    sigma: float,
    gain: float,
) -> Pixels:
    """White where edges are strong, grey where they are weak.

    With ``safe_steps`` n the strength x becomes floor(x * (n + 1)) / n, cut to 1: the few levels of the extension's
    "safe" modules, in which faint copies of the picture cannot hide.
    """
    strength = np.minimum(gain * edge_strength(at_resolution(pixels, resolution), edge_filter, sigma), 1)
    if safe_steps:
        strength = np.minimum(np.floor(strength * (safe_steps + 1)) / safe_steps, 1)
    return three_channels(255 * strength)


def scribble(
    pixels: Pixels,
    *,
    resolution: int,
    edge_threshold: float,
    line_sigma: float,
    edge_filter: str,
    sigma: float,
    gain: float,
) -> Pixels:
    """Thick white strokes along the ridges of the soft edges.

    The soft edges are smoothed by ``line_sigma``; what is the largest of three in any of four directions and above
    ``edge_threshold`` is kept, and smoothing by ``line_sigma`` once more makes strokes of it, white from 5 of 255 on.
    """
    import cv2

    soft = 255 * np.minimum(gain * edge_strength(at_resolution(pixels, resolution), edge_filter, sigma), 1)
    smooth = cv2.GaussianBlur(soft.astype(np.float32), (0, 0), line_sigma)
    line = np.eye(3, dtype=np.uint8)
    directions = (np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], np.uint8), line, line[::-1].copy())
    ridge = np.zeros(smooth.shape, np.bool_)
    for direction in (*directions, directions[0].T.copy()):
        ridge |= cv2.dilate(smooth, direction) == smooth
    thin = np.where(ridge & (smooth > edge_threshold), np.uint8(255), np.uint8(0))
    strokes = cv2.GaussianBlur(thin, (0, 0), line_sigma)
    return three_channels(np.where(strokes > 4, 255, 0))


def scribble_xdog(pixels: Pixels, *, resolution: int, xdog_threshold: float, sigma: float, ratio: float) -> Pixels:
    """White where every channel lies well below its surroundings: a thresholded difference of Gaussians.

    The wide Gaussian (``ratio`` times ``sigma``) less the narrow one, of the channel where that is least, is cut to
    0..255 and rounded up, doubled, and white above the threshold; the extension's module of this name with its sigmas
    of 0.5 and 5.
    """
    import cv2

    working = at_resolution(pixels, resolution).astype(np.float32)
    narrow, wide = (cv2.GaussianBlur(working, (0, 0), one) for one in (sigma, ratio * sigma))
    inverted = np.clip(255 - (wide - narrow).min(axis=2), 0, 255).astype(np.uint8)
    return three_channels(np.where(2 * (255 - inverted.astype(np.int32)) > xdog_threshold, 255, 0))


_FILTER = Parameter(
    name="filter",
    alias="edge_filter",
    kind="choice",
    default="sobel",
    choices=FILTERS,
    help="what measures edges: gradients, maximum less minimum, or a difference of Gaussians",
)
_GAIN = Parameter(
    name="gain",
    kind="number",
    default=4.0,
    minimum=0,
    maximum=1000,
    help="factor of the strength; 1: black to white is white",
)


def _sigma(default: float) -> Parameter:
    return Parameter(
        name="sigma", kind="number", default=default, minimum=0, maximum=64, help="smoothing before, in pixels"
    )


SOFT_EDGE = Annotator(
    name="softedge",
    summary="soft edges: the strength of gradients (Sobel, Scharr, morphological, difference of Gaussians)",
    function=soft_edges,
    aliases=("soft_edge", "softedge_classical"),
    stands_in_for={
        "softedge_hed": {},
        "softedge_hedsafe": {"safe_steps": 2},
        "softedge_pidinet": {},
        "softedge_pidisafe": {"safe_steps": 2},
        "softedge_teed": {"safe_steps": 2},
        "hed": {},
        "hed_safe": {"safe_steps": 2},
        "pidinet": {},
        "pidinet_safe": {"safe_steps": 2},
        "te_hed": {"safe_steps": 2},
    },
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="threshold_a",
            alias="safe_steps",
            kind="integer",
            default=0,
            minimum=0,
            maximum=10,
            help="levels above black that the strength is cut into; 0 for all",
        ),
        _FILTER,
        _sigma(1.0),
        _GAIN,
    ),
)
SCRIBBLE = Annotator(
    name="scribble",
    summary="scribble: thick strokes along the ridges of soft edges",
    function=scribble,
    aliases=("scribble_classical", "fake_scribble"),
    stands_in_for={"scribble_hed": {}, "scribble_pidinet": {}, "pidinet_scribble": {}},
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="threshold_a",
            alias="edge_threshold",
            kind="number",
            default=127.0,
            minimum=0,
            maximum=255,
            help="strength, of 255, above which a ridge is drawn",
        ),
        Parameter(
            name="line_sigma",
            kind="number",
            default=3.0,
            minimum=0.1,
            maximum=64,
            help="smoothing that thins edges and then thickens strokes, in pixels",
        ),
        _FILTER,
        _sigma(1.0),
        _GAIN,
    ),
)
SCRIBBLE_XDOG = Annotator(
    name="scribble_xdog",
    summary="scribble: what is darker than its surroundings, by a difference of Gaussians",
    function=scribble_xdog,
    aliases=("xdog",),
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="threshold_a",
            alias="xdog_threshold",
            kind="number",
            default=32.0,
            minimum=1,
            maximum=64,
            help="twice the difference above which a pixel is white",
        ),
        Parameter(
            name="sigma", kind="number", default=0.5, minimum=0.1, maximum=64, help="the narrow Gaussian, in pixels"
        ),
        Parameter(
            name="ratio",
            kind="number",
            default=10.0,
            minimum=1.01,
            maximum=64,
            help="the wide Gaussian over the narrow",
        ),
    ),
)
