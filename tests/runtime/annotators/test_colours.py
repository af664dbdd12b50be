"""Tile, blur, grid, shuffle and normal maps against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from controlrt.runtime.annotators import annotate
from controlrt.runtime.annotators.colours import smooth_noise
from controlrt.runtime.annotators.working_size import at_resolution
from sample_pictures import SIZES, noise, scene

cv2 = pytest.importorskip("cv2", reason="without the extra [annotate] there is no OpenCV")
ndimage = pytest.importorskip("scipy.ndimage", reason="the references are SciPy's filters")


def area_weights(before: int, after: int) -> np.ndarray:
    """(after, before): the share that each old pixel has in each new one."""
    scale = before / after
    starts = np.arange(after)[:, None] * scale
    old = np.arange(before)[None]
    return np.clip(np.minimum(old + 1, starts + scale) - np.maximum(old, starts), 0, None) / scale


def cubic_weights(before: int, after: int) -> np.ndarray:
    """(after, before): Keys's kernel with a = -0.75 at pixel centres, borders repeated; it widens nowhere."""
    a = -0.75
    weights = np.zeros((after, before))
    for row in range(after):
        position = (row + 0.5) * before / after - 0.5
        for tap in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            d = abs(position - tap)
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[row, min(max(tap, 0), before - 1)] += weight
    return weights


def apply(weights: tuple[np.ndarray, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    return np.einsum("ij,jk...,lk->il...", weights[0], pixels.astype(float), weights[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rate", [1.1, 2.0, 2.7, 8.0])
def test_tile(size: tuple[int, int], rate: float) -> None:
    pixels = noise(*size)
    height, width = (max(1, int(side / rate)) for side in size)
    expected = apply((area_weights(size[0], height), area_weights(size[1], width)), pixels)
    found = np.asarray(annotate("tile_resample", pixels, threshold_a=rate))
    np.testing.assert_allclose(found, expected, atol=0.51)
    np.testing.assert_array_equal(annotate("tile_resample", pixels, threshold_a=1.09), pixels)


@pytest.mark.parametrize("size", [(33, 47), (64, 48), (3, 90)])
@pytest.mark.parametrize("resolution", [7, 40, 100])
def test_working_size(size: tuple[int, int], resolution: int) -> None:
    pixels = noise(*size)
    made = at_resolution(pixels, resolution)
    weights = cubic_weights if resolution > min(size) else area_weights
    expected = apply((weights(size[0], made.shape[0]), weights(size[1], made.shape[1])), pixels)
    np.testing.assert_allclose(made, np.clip(expected, 0, 255), atol=1.01)  # bicubic is in fixed point
    assert at_resolution(pixels, 0) is pixels
    depth = noise(*size)[..., 0].astype(np.float32)
    assert at_resolution(depth, resolution).shape == made.shape[:2]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sigma", [0.3, 2.0, 9.0])
def test_blur(size: tuple[int, int], sigma: float) -> None:
    pixels = scene(*size)
    radius = (round(6 * sigma + 1) | 1) // 2  # OpenCV cuts off bytes at three sigmas
    channels = [
        ndimage.gaussian_filter(pixels[..., channel].astype(float), sigma, mode="mirror", radius=radius)
        for channel in range(3)
    ]
    found = np.asarray(annotate("blur_gaussian", pixels, sigma=sigma))
    np.testing.assert_allclose(found, np.stack(channels, axis=-1), atol=1.5)  # its weights for bytes have 8 bits


@pytest.mark.parametrize(
    ("size", "cell"), [((64, 128), 64), ((64, 128), 16), ((70, 90), 32), ((5, 5), 64), ((9, 7), 1)]
)
def test_colour_grid(size: tuple[int, int], cell: int) -> None:
    pixels = scene(*size)
    grid = tuple(max(1, side // cell) for side in size)
    coarse = apply((cubic_weights(size[0], grid[0]), cubic_weights(size[1], grid[1])), pixels)
    rows, columns = (np.arange(side) * few // side for side, few in zip(size, grid, strict=True))
    expected = np.clip(coarse, 0, 255)[rows][:, columns]
    found = np.asarray(annotate("color", pixels, cell=cell))
    np.testing.assert_allclose(found, expected, atol=1.01)
    assert len(np.unique(found.reshape(-1, 3), axis=0)) <= grid[0] * grid[1]


@pytest.mark.parametrize(("size", "cell"), [((40, 56), 256), ((40, 56), 8), ((1, 1), 4)])
def test_the_shuffling_map(size: tuple[int, int], cell: int) -> None:
    height, width = size
    coarse = np.random.default_rng(5).random((height // cell + 2, width // cell + 2))
    larger = (height + 2 * cell, width + 2 * cell)
    fine = apply((cubic_weights(coarse.shape[0], larger[0]), cubic_weights(coarse.shape[1], larger[1])), coarse)
    field = fine[cell : cell + height, cell : cell + width]
    field = (field - field.min()) / (np.ptp(field) or 1)
    found = smooth_noise(np.random.default_rng(5), height, width, cell)
    np.testing.assert_allclose(found, field, atol=1e-4)  # OpenCV's weights are float32, and the field is stretched


def test_shuffle_reads_where_the_map_says() -> None:
    y, x = np.mgrid[:48, :64]
    pixels = np.stack([4 * x, 5 * y, 2 * x + 2 * y], axis=-1).astype(np.uint8)
    draws = np.random.default_rng(11)
    columns, rows = (smooth_noise(draws, 48, 64, 16) * side for side in (63, 47))
    expected = np.stack([4 * columns, 5 * rows, 2 * columns + 2 * rows], axis=-1)  # bilinear is exact on planes
    found = np.asarray(annotate("shuffle", pixels, seed=11, smoothness=16))
    np.testing.assert_allclose(found, expected, atol=0.6 + 5 / 32)  # coordinates may be rounded to 1/32
    assert found.min() == 0
    assert (found != np.asarray(annotate("shuffle", pixels, seed=12, smoothness=16))).any()


def depths() -> dict[str, np.ndarray]:
    y, x = np.mgrid[:40, :56]
    return {
        "slope": x / 55,
        "bowl": np.hypot(y - 20, x - 28) / 40,
        "even": np.full((40, 56), 0.3),
        "rough": np.random.default_rng(2).random((40, 56)),
    }


@pytest.mark.parametrize("name", list(depths()))
@pytest.mark.parametrize(("threshold", "strength"), [(0.4, 1.0), (0.0, 3.0), (1.0, 1.0)])
def test_normal_map(name: str, threshold: float, strength: float) -> None:
    depth = depths()[name]
    x, y = (strength * 255 * ndimage.sobel(depth, axis=axis, mode="mirror") for axis in (1, 0))
    stretched = (depth - depth.min()) / (np.ptp(depth) or 1)
    x, y = (np.where(stretched < threshold, 0, one) for one in (x, y))
    normal = np.stack([x, y, np.full_like(x, 2 * np.pi)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    found = np.asarray(annotate("normal_map", depth, threshold_a=threshold, strength=strength))
    # whole numbers are cut off; a pixel at the threshold itself may fall on either side
    assert (np.abs(found - (normal * 127.5 + 127.5)).max(axis=-1) <= 1.01).mean() > 0.99


def test_depth_of_sixteen_bits_is_not_rounded_to_eight() -> None:
    levels = (20000 + 40 * np.mgrid[:40, :56][1]).astype(np.uint16)  # six pixels to a level of 8 bits
    fine = annotate("normal_map", Image.fromarray(levels), bg_threshold=0, strength=100)
    red = np.asarray(fine)[:, 2:-2, 0]
    assert np.ptp(red.astype(int)) <= 1  # the slope is the same everywhere
    np.testing.assert_array_equal(fine, annotate("normal_map", levels, bg_threshold=0, strength=100))
    coarse = np.asarray(annotate("normal_map", (levels >> 8).astype(np.uint8), bg_threshold=0, strength=100))
    assert np.ptp(coarse[:, 2:-2, 0].astype(int)) > 50
