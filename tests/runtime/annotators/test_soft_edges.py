"""Soft edges and scribbles against SciPy's filters."""

from __future__ import annotations

import numpy as np
import pytest

from controlrt.runtime.annotators import annotate
from controlrt.runtime.annotators.soft_edges import FILTERS, edge_strength
from sample_pictures import SIZES, noise, scene

cv2 = pytest.importorskip("cv2", reason="without the extra [annotate] there is no OpenCV")
ndimage = pytest.importorskip("scipy.ndimage", reason="the references are SciPy's filters")
KERNELS = {"sobel": np.outer([1, 2, 1], [-1, 0, 1]) / 4, "scharr": np.outer([3, 10, 3], [-1, 0, 1]) / 16}


def blurred(plane: np.ndarray, sigma: float) -> np.ndarray:
    radius = (round(8 * sigma + 1) | 1) // 2
    return ndimage.gaussian_filter(plane, sigma, mode="mirror", radius=radius) if sigma else plane


def strength(pixels: np.ndarray, kind: str, sigma: float) -> np.ndarray:
    planes = []
    for channel in range(3):
        plane = pixels[..., channel] / 255
        if kind == "dog":
            sigma = max(sigma, 0.5)
            step = np.repeat([0.0, 1.0], 400)
            whole = np.abs(ndimage.gaussian_filter1d(step, 20) - ndimage.gaussian_filter1d(step, 32)).max()
            planes.append(np.abs(blurred(plane, sigma) - blurred(plane, 1.6 * sigma)) / whole)
            continue
        plane = blurred(plane, sigma)
        if kind == "morphological":
            highest, lowest = (
                one(plane, 3, mode="nearest") for one in (ndimage.maximum_filter, ndimage.minimum_filter)
            )
            planes.append(highest - lowest)
        else:
            across = ndimage.correlate(plane, KERNELS[kind], mode="mirror")
            down = ndimage.correlate(plane, KERNELS[kind].T, mode="mirror")
            planes.append(np.hypot(across, down))
    return np.max(planes, axis=0)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("make", "sigma"), [(noise, 0.0), (scene, 1.0), (noise, 2.5)])
def test_strength(kind: str, size: tuple[int, int], make: object, sigma: float) -> None:
    pixels = make(*size)
    # a step sampled at whole pixels misses the peak of the difference by 2e-4 at a sigma of 20
    rtol = 5e-4 if kind == "dog" else 1e-5
    np.testing.assert_allclose(edge_strength(pixels, kind, sigma), strength(pixels, kind, sigma), rtol=rtol, atol=5e-6)


@pytest.mark.parametrize("kind", FILTERS)
def test_black_to_white_is_one(kind: str) -> None:
    step = np.zeros((40, 40, 3), np.uint8)
    step[:, 20:] = 255
    if kind == "dog":  # by what continuous Gaussians make of a step, which small ones on whole pixels are not
        assert edge_strength(step, kind, 3.0).max() == pytest.approx(1, abs=0.05)
        assert edge_strength(step, kind, 0.0).max() == edge_strength(step, kind, 0.5).max() < 1.3
    else:
        assert edge_strength(step, kind, 0.0).max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("gain", [0.5, 4.0])
def test_safe_steps(steps: int, gain: float) -> None:
    pixels = scene(48, 64)
    x = np.minimum(gain * edge_strength(pixels, "sobel", 1.0), 1)
    expected = np.minimum(np.floor(x * (steps + 1)) / steps, 1) if steps else x
    found = np.asarray(annotate("softedge", pixels, safe_steps=steps, gain=gain))[..., 0]
    np.testing.assert_allclose(found, 255 * expected, atol=1)
    if steps:
        assert len(np.unique(found)) <= steps + 1


def test_gain_and_filter_matter() -> None:
    pixels = scene(48, 64)
    means = [np.asarray(annotate("softedge", pixels, gain=gain)).mean() for gain in (0, 1, 4, 100)]
    assert means[0] == 0
    assert means[1] < means[2] < means[3]
    made = [np.asarray(annotate("softedge", pixels, filter=kind)) for kind in FILTERS]
    assert all((a != b).any() for i, a in enumerate(made) for b in made[:i])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threshold", [32.0, 1.0, 64.0])
def test_scribble_xdog(size: tuple[int, int], threshold: float) -> None:
    pixels = scene(*size)
    wide, narrow = (
        np.stack([blurred(pixels[..., c].astype(float), sigma) for c in range(3)], axis=-1) for sigma in (5.0, 0.5)
    )
    difference = (wide - narrow).min(axis=2)
    found = np.asarray(annotate("scribble_xdog", pixels, threshold_a=threshold))[..., 0]
    expected = np.where(2 * np.ceil(np.clip(difference, 0, 255)) > threshold, 255, 0)
    # the others are rounded up by the last bit of a float
    certain = (np.abs(difference - np.round(difference)) > 1e-3) | (difference < -1e-3)
    np.testing.assert_array_equal(found[certain], expected[certain])
    assert size < (30, 30) or certain.mean() > 0.95


@pytest.mark.parametrize(("line_sigma", "threshold"), [(3.0, 127.0), (1.5, 60.0), (0.6, 10.0)])
def test_scribble(line_sigma: float, threshold: float) -> None:
    """Ridges by comparing shifted copies. Smoothing is OpenCV's in both: on plateaus the last bit decides."""
    pixels = scene(64, 80)
    soft = np.minimum(4 * edge_strength(pixels, "sobel", 1.0), 1) * 255
    smooth = cv2.GaussianBlur(soft.astype(np.float32), (0, 0), line_sigma)
    padded = np.pad(smooth, 1, constant_values=-np.inf)
    ridge = np.zeros(smooth.shape, np.bool_)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        ends = [padded[1 + s * dy : 65 + s * dy, 1 + s * dx : 81 + s * dx] for s in (-1, 1)]
        ridge |= (smooth >= ends[0]) & (smooth >= ends[1])
    thin = np.where(ridge & (smooth > threshold), 255.0, 0.0)
    expected = blurred(thin, line_sigma) > 4.5  # OpenCV rounds to bytes
    found = np.asarray(annotate("scribble", pixels, line_sigma=line_sigma, edge_threshold=threshold))[..., 0]
    assert set(np.unique(found)) <= {0, 255}
    assert 0.02 < expected.mean() < 0.98
    assert ((found > 0) != expected).mean() < 0.01  # bytes are blurred in fixed point and cut off at three sigmas


def test_scribbles_get_thicker() -> None:
    picture = np.full((100, 100, 3), 250, np.uint8)
    cv2.circle(picture, (50, 50), 30, (0, 0, 0), -1)
    made = [np.asarray(annotate("scribble", picture, line_sigma=s))[..., 0] > 0 for s in (1.0, 2.0, 3.0)]
    assert made[0].sum() < made[1].sum() < made[2].sum()
    rows, columns = np.nonzero(made[0])
    assert np.abs(np.hypot(rows - 50, columns - 50) - 30).max() < 5
