"""Lines, white on black: Canny's edges, line art by the extended difference of Gaussians, straight segments."""

from __future__ import annotations

import numpy as np

from controlrt.runtime.annotators.annotator import PROCESSOR_RES, Annotator, Parameter, Pixels
from controlrt.runtime.annotators.working_size import at_resolution, three_channels
from controlrt.runtime.errors import ParameterError

WIDE_OVER_NARROW = 1.6
"""Ratio of the Gaussians in Winnemöller et al. 2012; with it their difference is near the Laplacian."""


def canny(pixels: Pixels, *, resolution: int, low_threshold: float, high_threshold: float) -> Pixels:
    """Edges by Canny's detector (Canny 1986), as ``cv2.Canny`` finds them.

    Raises:
        ParameterError: thresholds in the wrong order.
    """
    if low_threshold > high_threshold:
        raise ParameterError(
            "threshold_a (low_threshold)", low_threshold, f"at most threshold_b (high_threshold), {high_threshold:g}"
        )
    import cv2

    edges = cv2.Canny(np.ascontiguousarray(at_resolution(pixels, resolution)), low_threshold, high_threshold)
    return three_channels(edges)


def lineart_standard(pixels: Pixels, *, resolution: int, sigma: float) -> Pixels:
    """Dark lines on light ground, as light on black: how far every channel is below its surroundings.

    A Gaussian of ``sigma`` less the picture, of the channel where that is least, from 0 up; then scaled so that the
    median of what is above 8 becomes 127, with 16 as the least median.
    """
    import cv2

    working = at_resolution(pixels, resolution).astype(np.float32)
    below = np.clip((cv2.GaussianBlur(working, (0, 0), sigma) - working).min(axis=2), 0, 255)
    marked = below[below > 8]
    return three_channels(below * (127 / max(16.0, float(np.median(marked)) if marked.size else 0.0)))


def lineart_xdog(
    pixels: Pixels, *, resolution: int, sigma: float, sharpness: float, epsilon: float, phi: float, denoise: int
) -> Pixels:
    """Line art by the extended difference of Gaussians (Winnemöller, Kyprianidis & Olsen 2012), inverted.

    With L the luma in 0..1 and G a Gaussian, S = (1 + p) G(sigma) L - p G(1.6 sigma) L; white paper where
    S >= epsilon and 1 + tanh(phi (S - epsilon)) below. Where the picture is even S is L, so with the default epsilon of
    0 only lines get ink, and with more of it dark areas too. ``denoise`` is the side of a median filter before it.
    """
    import cv2

    working = np.ascontiguousarray(at_resolution(pixels, resolution))
    if denoise > 1:
        working = cv2.medianBlur(working, denoise // 2 * 2 + 1)
    luma = cv2.cvtColor(working, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    narrow, wide = (cv2.GaussianBlur(luma, (0, 0), one) for one in (sigma, WIDE_OVER_NARROW * sigma))
    sharpened = (1 + sharpness) * narrow - sharpness * wide
    ink = np.where(sharpened >= epsilon, 0, -np.tanh(phi * (sharpened - epsilon)))
    return three_channels(np.round(255 * ink))


def straight_lines(
    pixels: Pixels, *, resolution: int, min_density: float, min_length: float, line_width: int
) -> Pixels:
    """Straight segments by the detector LSD (Grompone von Gioi et al. 2012), as OpenCV finds them in the luma."""
    import cv2

    working = np.ascontiguousarray(at_resolution(pixels, resolution))
    luma = cv2.cvtColor(working, cv2.COLOR_RGB2GRAY)
    found = cv2.createLineSegmentDetector(cv2.LSD_REFINE_STD, density_th=min_density).detect(luma)[0]
    drawn = np.zeros(luma.shape, np.uint8)
    for x0, y0, x1, y1 in () if found is None else found.reshape(-1, 4).astype(float):
        if np.hypot(x1 - x0, y1 - y0) >= min_length:
            cv2.line(drawn, (round(x0), round(y0)), (round(x1), round(y1)), 255, line_width)
    return three_channels(drawn)


CANNY = Annotator(
    name="canny",
    summary="thin edges by Canny's detector",
    function=canny,
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="threshold_a",
            alias="low_threshold",
            kind="number",
            default=100.0,
            minimum=0,
            maximum=2040,
            help="gradient from which a pixel beside an edge belongs to it",
        ),
        Parameter(
            name="threshold_b",
            alias="high_threshold",
            kind="number",
            default=200.0,
            minimum=0,
            maximum=2040,
            help="gradient from which a pixel starts an edge",
        ),
    ),
)
LINEART_STANDARD = Annotator(
    name="lineart_standard",
    summary="line art: dark lines on light ground become light lines on black",
    function=lineart_standard,
    aliases=("lineart_standard (from white bg & black line)",),
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="sigma",
            kind="number",
            default=6.0,
            minimum=0.1,
            maximum=64,
            help="size of the surroundings, in pixels",
        ),
    ),
)
LINEART = Annotator(
    name="lineart_xdog",
    summary="line art of photographs: extended difference of Gaussians",
    function=lineart_xdog,
    stands_in_for={
        "lineart": {},
        "lineart_realistic": {},
        "lineart_coarse": {"sigma": 2.0},
        "lineart_anime": {},
        "lineart_anime_denoise": {"denoise": 5},
    },
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="sigma",
            kind="number",
            default=1.0,
            minimum=0.1,
            maximum=64,
            help="the narrow Gaussian: width of lines",
        ),
        Parameter(
            name="sharpness",
            kind="number",
            default=40.0,
            minimum=0,
            maximum=1000,
            help="p of the paper: weight of the difference against the picture",
        ),
        Parameter(
            name="epsilon", kind="number", default=0.0, minimum=-10, maximum=10, help="what is paper, of 1 for white"
        ),
        Parameter(
            name="phi", kind="number", default=4.0, minimum=0, maximum=1000, help="how fast ink gets full below it"
        ),
        Parameter(
            name="denoise",
            kind="integer",
            default=0,
            minimum=0,
            maximum=31,
            help="side of a median filter first; 0 for none",
        ),
    ),
)
STRAIGHT_LINES = Annotator(
    name="straight_lines",
    summary="straight segments by the detector LSD",
    function=straight_lines,
    aliases=("lsd",),
    stands_in_for={"mlsd": {}},
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="threshold_a",
            alias="min_density",
            kind="number",
            default=0.7,
            minimum=0,
            maximum=0.99,
            help="share of a segment's rectangle whose gradients agree with it",
        ),
        Parameter(
            name="threshold_b",
            alias="min_length",
            kind="number",
            default=20.0,
            minimum=0,
            maximum=8192,
            help="shortest segment that is drawn, in pixels",
        ),
        Parameter(
            name="line_width", kind="integer", default=1, minimum=1, maximum=64, help="width of the lines, in pixels"
        ),
    ),
)
