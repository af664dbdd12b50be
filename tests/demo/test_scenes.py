from __future__ import annotations

import numpy as np
import pytest

from controlrt.demo.scenes import HELD_OUT_SHAPES, PALETTE, TRAINED_SHAPES, sample_scene
from controlrt.runtime.annotators.colours import colour_grid


@pytest.mark.parametrize("seed", range(20))
def test_scene_is_what_its_prompt_says(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed), TRAINED_SHAPES + HELD_OUT_SHAPES)
    picture, silhouette = scene.render(512), scene.silhouette(512)
    assert scene.prompt.endswith(f"{scene.background} background")
    assert all(f"{scene.colour} {shape.kind}" in scene.prompt for shape in scene.shapes)
    assert tuple(np.median(picture[silhouette], axis=0)) == PALETTE[scene.colour]
    assert tuple(picture[0, 0]) == PALETTE[scene.background]
    assert 0.01 < silhouette.mean() < 0.4


@pytest.mark.parametrize("seed", range(5))
def test_controls_lie_on_the_shapes(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    silhouette = scene.silhouette(512)
    np.testing.assert_array_equal(scene.control("mask", 512)[..., 0] > 0, silhouette)
    rows, columns = np.nonzero(scene.control("canny", 512)[..., 0])
    assert len(rows) > 100
    for row, column in zip(rows, columns, strict=True):  # every edge pixel has both sides nearby
        window = silhouette[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4]
        assert window.any()
        assert not window.all()


def test_same_seed_same_scene_at_every_size() -> None:
    one, two = (sample_scene(np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one.render(256), two.render(256))
    small, large = one.silhouette(128), one.silhouette(512)[2::4, 2::4]
    assert np.mean(small != large) < 0.01


def test_unknown_control() -> None:
    with pytest.raises(ValueError, match="canny, color, mask"):
        sample_scene(np.random.default_rng(0)).control("depth", 64)


def test_colour_grid_is_the_annotators() -> None:
    scene = sample_scene(np.random.default_rng(4))
    pixels = scene.render(512)
    expected = colour_grid(pixels, resolution=512, cell=64)
    np.testing.assert_array_equal(scene.control("color", 512), expected)
