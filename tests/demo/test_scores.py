"""Scores of pictures, on pictures whose scores are known."""

from __future__ import annotations

import numpy as np
import pytest

from controlrt.demo.scenes import PALETTE, Scene, sample_scene
from controlrt.demo.scores import foreground, iou, nearest_colour, score


@pytest.fixture
def scene() -> Scene:
    return sample_scene(np.random.default_rng(7))


def test_the_scene_itself_is_right(scene: Scene) -> None:
    found = score(scene, scene.render(256))
    assert found.iou > 0.99
    assert found.both_colours


@pytest.mark.parametrize("seed", range(4))
def test_what_is_missing_lowers_the_iou_by_its_share(seed: int) -> None:
    """A picture of which one half shows the background alone."""
    scene = sample_scene(np.random.default_rng(seed))
    picture, whole = scene.render(256), scene.silhouette(256)
    picture[:, 128:] = PALETTE[scene.background]
    expected = np.count_nonzero(whole[:, :128]) / np.count_nonzero(whole)
    assert score(scene, picture).iou == pytest.approx(expected, abs=0.02)


def test_each_colour_counts_by_itself(scene: Scene) -> None:
    others = [name for name in PALETTE if name not in (scene.colour, scene.background)]
    shape = Scene(shapes=scene.shapes, colour=others[0], background=scene.background)
    ground = Scene(shapes=scene.shapes, colour=scene.colour, background=others[1])
    found = [score(scene, each.render(256)) for each in (shape, ground)]
    assert [(each.shape_colour, each.background_colour) for each in found] == [(False, True), (True, False)]
    assert not any(each.both_colours for each in found)


def test_parts() -> None:
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert (iou(empty, empty), iou(empty, full), iou(full, full)) == (1.0, 0.0, 1.0)
    assert nearest_colour(np.array([PALETTE["pink"]] * 3, np.uint8)) == "pink"
    picture = np.full((64, 64, 3), PALETTE["white"], np.uint8)
    picture[20:40, 20:40] = PALETTE["red"]
    assert np.array_equal(foreground(picture, "red"), (picture == PALETTE["red"]).all(axis=-1))
