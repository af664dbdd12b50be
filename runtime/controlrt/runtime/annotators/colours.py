"""Annotators that keep the colours, or turn them into black and white: tile, blur, grid, shuffle, invert, threshold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.annotators.annotator import PROCESSOR_RES, Annotator, Parameter, Pixels
from controlrt.runtime.annotators.working_size import at_resolution, three_channels
from controlrt.runtime.errors import PictureError

LONGEST_MAPPED = 32766


def pass_through(pixels: Pixels) -> Pixels:
    """The picture as it is."""
    return pixels


def invert(pixels: Pixels) -> Pixels:
    """The negative."""
    return 255 - pixels


def threshold(pixels: Pixels, *, resolution: int, threshold: float) -> Pixels:
    """White where every channel is above the threshold, black elsewhere."""
    return three_channels(np.where(at_resolution(pixels, resolution).min(axis=2) > threshold, 255, 0))


def tile_resample(pixels: Pixels, *, down_sampling_rate: float) -> Pixels:
    """The picture, smaller by a rate: means of areas, sides rounded down. Rates below 1.1 leave it as it is."""
    if down_sampling_rate < 1.1:
        return pixels
    import cv2

    size = tuple(max(1, int(side / down_sampling_rate)) for side in pixels.shape[1::-1])
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def blur_gaussian(pixels: Pixels, *, resolution: int, sigma: float) -> Pixels:
    """The picture under a Gaussian."""
    import cv2

    return np.asarray(
        cv2.GaussianBlur(np.ascontiguousarray(at_resolution(pixels, resolution)), (0, 0), sigma), np.uint8
    )


def colour_grid(pixels: Pixels, *, resolution: int, cell: int) -> Pixels:
    """Squares of one colour: the picture, sampled bicubically at one point for each ``cell`` x ``cell`` pixels.

    Sides that are no multiple of ``cell`` have a cell less, and cells a little larger.
    """
    import cv2

    working = np.ascontiguousarray(at_resolution(pixels, resolution))
    height, width = working.shape[:2]
    grid = cv2.resize(working, (max(1, width // cell), max(1, height // cell)), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.resize(grid, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def shuffle(pixels: Pixels, *, resolution: int, seed: int, smoothness: int) -> Pixels:
    """The picture's content in another place: every pixel is read from where a smooth random map says.

    Both coordinates of the map are uniform noise on a grid of ``smoothness`` pixels, interpolated bicubically and
    stretched to the whole picture, so colours and textures stay and composition goes. One seed gives one map.

    Raises:
        PictureError: a side that OpenCV's map cannot name.
    """
    import cv2

    working = np.ascontiguousarray(at_resolution(pixels, resolution))
    height, width = working.shape[:2]
    if max(height, width) > LONGEST_MAPPED:
        raise PictureError(f"the picture to shuffle is {width}x{height}; at most {LONGEST_MAPPED} pixels a side")
    noise = np.random.default_rng(seed)
    x = smooth_noise(noise, height, width, smoothness) * (width - 1)
    y = smooth_noise(noise, height, width, smoothness) * (height - 1)
    moved = cv2.remap(working, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
    return np.asarray(moved, np.uint8)


def smooth_noise(noise: np.random.Generator, height: int, width: int, cell: int) -> NDArray[np.float64]:
    """(height, width) in [0, 1], its least value 0 and its largest 1: noise that changes over ``cell`` pixels."""
    import cv2

    coarse = noise.random((height // cell + 2, width // cell + 2))
    fine = cv2.resize(coarse, (width + 2 * cell, height + 2 * cell), interpolation=cv2.INTER_CUBIC)
    field: NDArray[np.float64] = fine[cell : cell + height, cell : cell + width]
    field = field - field.min()
    return np.asarray(field / (float(field.max()) or 1.0))


NONE = Annotator(
    name="none", summary="the picture as it is", function=pass_through, aliases=("pass-through", "identity")
)
INVERT = Annotator(
    name="invert",
    summary="the negative: black lines on white become white lines on black",
    function=invert,
    aliases=("invert (from white bg & black line)",),
)
THRESHOLD = Annotator(
    name="threshold",
    summary="white where every channel is above a threshold",
    function=threshold,
    aliases=("binary",),
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="threshold_a",
            alias="threshold",
            kind="number",
            default=127.0,
            minimum=0,
            maximum=255,
            help="brightness above which a pixel is white",
        ),
    ),
)
TILE = Annotator(
    name="tile_resample",
    summary="the picture, smaller: for ControlNets that add detail (tile)",
    function=tile_resample,
    aliases=("tile",),
    parameters=(
        Parameter(
            name="threshold_a",
            alias="down_sampling_rate",
            kind="number",
            default=1.0,
            minimum=1,
            maximum=8,
            help="how many times smaller",
        ),
    ),
)
BLUR = Annotator(
    name="blur_gaussian",
    summary="the picture, blurred",
    function=blur_gaussian,
    aliases=("blur",),
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="threshold_a",
            alias="sigma",
            kind="number",
            default=9.0,
            minimum=0.01,
            maximum=64,
            help="of the Gaussian, in pixels",
        ),
    ),
)
COLOUR_GRID = Annotator(
    name="t2ia_color_grid",
    summary="squares of one colour each: where which colour is",
    function=colour_grid,
    aliases=("color", "color_grid", "colour_grid"),
    parameters=(
        PROCESSOR_RES,
        Parameter(name="cell", kind="integer", default=64, minimum=1, maximum=8192, help="side of a square, in pixels"),
    ),
)
SHUFFLE = Annotator(
    name="shuffle",
    summary="the picture's colours and textures in another place, by a seed",
    function=shuffle,
    parameters=(
        PROCESSOR_RES,
        Parameter(
            name="seed",
            kind="integer",
            default=0,
            minimum=0,
            maximum=2**32 - 1,
            help="of the map; the same seed, the same map",
        ),
        Parameter(
            name="smoothness",
            kind="integer",
            default=256,
            minimum=1,
            maximum=1024,
            help="pixels over which the map changes",
        ),
    ),
)
