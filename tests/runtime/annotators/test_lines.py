"""Canny, line art and straight segments against NumPy and SciPy written from the papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest

from controlrt.runtime.annotators import annotate
from sample_pictures import SIZES, noise, scene

cv2 = pytest.importorskip("cv2", reason="without the extra [annotate] there is no OpenCV")
ndimage = pytest.importorskip("scipy.ndimage", reason="the references are SciPy's filters")


def blurred(channels: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian as OpenCV cuts it off for floats: four sigmas, borders mirrored without repeating the edge."""
    radius = (round(8 * sigma + 1) | 1) // 2
    axes = tuple(range(min(channels.ndim, 2)))
    return ndimage.gaussian_filter(channels.astype(np.float64), sigma, mode="mirror", radius=radius, axes=axes)


def canny(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Canny 1986 with OpenCV's choices: Sobel on replicated borders, |dx| + |dy|, the channel where that is largest."""
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    derivatives = [
        np.stack([ndimage.correlate(pixels[..., c].astype(np.int64), k, mode="nearest") for c in range(3)], axis=-1)
        for k in (kernel, kernel.T)
    ]
    length = sum(np.abs(one) for one in derivatives)
    channel = length.argmax(axis=2)[..., None]
    dx, dy, length = (np.take_along_axis(one, channel, axis=2)[..., 0] for one in (*derivatives, length))
    padded = np.pad(length, 1)
    height, width = length.shape

    def at(row: int, column: int) -> np.ndarray:
        return padded[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    tangent = np.abs(dy) << 15
    narrow = np.abs(dx) * 13573  # tan 22.5 degrees in 15 bits
    wide = narrow + (np.abs(dx) << 16)  # tan 67.5 is tan 22.5 plus 2
    sideways = (tangent < narrow) & (length > at(0, -1)) & (length >= at(0, 1))
    upright = (tangent > wide) & (length > at(-1, 0)) & (length >= at(1, 0))
    falling = (dx ^ dy) >= 0
    slanted = (tangent >= narrow) & (tangent <= wide)
    across = np.where(falling, (length > at(-1, -1)) & (length > at(1, 1)), (length > at(-1, 1)) & (length > at(1, -1)))
    ridge = (length > low) & (sideways | upright | (slanted & across))
    labels, _ = ndimage.label(ridge, np.ones((3, 3)))
    strong = np.unique(labels[ridge & (length > high)])
    return np.where(np.isin(labels, strong[strong > 0]), 255, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [noise, scene])
@pytest.mark.parametrize("thresholds", [(100, 200), (40, 90), (150, 150), (0, 600)])
def test_canny(size: tuple[int, int], make: object, thresholds: tuple[int, int]) -> None:
    pixels = make(*size)
    found = np.asarray(annotate("canny", pixels, threshold_a=thresholds[0], threshold_b=thresholds[1]))
    np.testing.assert_array_equal(found[..., 0], canny(pixels, *thresholds))


def test_higher_thresholds_leave_fewer_edges() -> None:
    pixels = scene(64, 96)
    edges = [np.asarray(annotate("canny", pixels, low_threshold=t, high_threshold=2 * t)) for t in (50, 150, 400)]
    assert edges[0].sum() > edges[1].sum() > edges[2].sum() > 0


def test_edges_lie_on_the_outline() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    cv2.circle(picture, (32, 32), 20, (255, 120, 0), -1)
    rows, columns = np.nonzero(np.asarray(annotate("canny", picture))[..., 0])
    assert len(rows) > 80
    distance = np.hypot(rows - 32, columns - 32)
    assert distance.min() > 18
    assert distance.max() < 22


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("make", "sigma"), [(noise, 6.0), (scene, 6.0), (scene, 1.5)])
def test_lineart_standard(size: tuple[int, int], make: object, sigma: float) -> None:
    pixels = make(*size)
    below = np.clip((blurred(pixels, sigma) - pixels).min(axis=2), 0, 255)
    over_8 = below[below > 8]
    expected = np.clip(below / max(16, np.median(over_8) if over_8.size else 0) * 127, 0, 255)
    found = np.asarray(annotate("lineart_standard", pixels, sigma=sigma))[..., 0]
    np.testing.assert_allclose(found, expected, atol=1.01)  # cut to whole numbers


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "given", [{}, {"sigma": 2.0, "sharpness": 20.0}, {"epsilon": 0.5, "phi": 10.0}, {"sharpness": 0.0, "epsilon": 1.0}]
)
def test_lineart_xdog(size: tuple[int, int], given: dict[str, float]) -> None:
    """Winnemöller et al. 2012, as the docstring has it."""
    pixels = scene(*size)
    sigma, p, epsilon, phi = ({"sigma": 1.0, "sharpness": 40.0, "epsilon": 0.0, "phi": 4.0} | given).values()
    luma = np.round(pixels @ np.array([0.299, 0.587, 0.114])) / 255
    sharpened = (1 + p) * blurred(luma, sigma) - p * blurred(luma, 1.6 * sigma)
    expected = 255 * (1 - np.where(sharpened >= epsilon, 1, 1 + np.tanh(phi * (sharpened - epsilon))))
    found = np.asarray(annotate("lineart_xdog", pixels, **given))[..., 0]
    # OpenCV's luma is in fixed point: it may be one level off at a pixel, and the slope is phi (1 + p)
    assert np.quantile(np.abs(found - expected), 0.95) <= 1
    assert np.abs(found - expected).max() <= max(1, phi * (1 + p))


def test_denoising_takes_specks_out() -> None:
    pixels = np.full((40, 40, 3), 200, np.uint8)
    pixels[10:30:9, 10:30:9] = 0
    assert np.asarray(annotate("lineart_xdog", pixels)).any()
    assert not np.asarray(annotate("lineart_xdog", pixels, denoise=3)).any()
    assert not np.asarray(annotate("lineart_xdog", pixels, denoise=4)).any()  # medians have odd sides


def test_straight_lines_are_the_sides_of_a_polygon() -> None:
    corners = np.array([(20, 25), (170, 60), (120, 170), (30, 140)])
    picture = np.full((200, 200, 3), 220, np.uint8)
    cv2.fillPoly(picture, [corners], (30, 60, 90))
    drawn = np.asarray(annotate("straight_lines", picture, min_length=30))[..., 0] > 0
    on_a_side = np.zeros((200, 200), np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        t = np.linspace(0, 1, 400)
        x, y = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
        rows, columns = np.mgrid[:200, :200]
        near = np.min(np.hypot(rows[..., None] - y[::20], columns[..., None] - x[::20]), axis=-1)
        length = np.hypot(x1 - x0, y1 - y0)
        away = np.abs((columns - x0) * (y1 - y0) - (rows - y0) * (x1 - x0)) / length
        side = (away < 2) & (near < 0.06 * length + 2)
        assert (drawn & side).sum() > 0.8 * max(abs(x1 - x0), abs(y1 - y0))
        on_a_side |= side
    assert not (drawn & ~on_a_side).any()
    long_ones = np.asarray(annotate("straight_lines", picture, threshold_b=125))[..., 0] > 0
    assert 0 < long_ones.sum() < drawn.sum()
    assert not (long_ones & ~drawn).any()
    thick = np.asarray(annotate("straight_lines", picture, min_length=30, line_width=3))[..., 0] > 0
    assert thick.sum() > 2 * drawn.sum()
    assert (thick | ~drawn).all()


def test_density_asks_more_of_segments() -> None:
    pixels = scene(96, 128, seed=3)
    counts = [np.asarray(annotate("straight_lines", pixels, min_density=d, min_length=20)).sum() for d in (0.1, 0.95)]
    assert counts[0] > counts[1]
