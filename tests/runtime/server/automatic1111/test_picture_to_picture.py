"""Picture to picture and inpainting over the web UI's interface, on a service that draws noise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from webui_client import SCENE, Client, as_base64, opened, unit

import sample_pictures
from fake_service import fake_pictures


def test_picture_to_picture(web: Client) -> None:
    answer = web.img2img(prompt="a", denoising_strength=0.75, steps=20)
    found = web.arguments()
    np.testing.assert_array_equal(np.asarray(found["init_image"]), np.asarray(SCENE))
    assert found["strength"] == 16 / 20
    assert "mask_image" not in found
    assert answer["parameters"]["init_images"] is None
    assert json.loads(answer["info"])["denoising_strength"] == 0.75
    assert web.img2img(include_init_images=True)["parameters"]["init_images"] == [as_base64(SCENE)]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_pictures_of_another_size_are_fitted(web: Client, mode: int) -> None:
    web.img2img(init_images=[as_base64(SCENE.resize((100, 40)))], resize_mode=mode)
    assert web.arguments()["init_image"].size == (64, 64)


def test_a_picture_for_each_of_a_batch(web: Client) -> None:
    other = SCENE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    web.img2img(init_images=[as_base64(SCENE), "data:image/png;base64," + as_base64(other)], batch_size=2)
    first, second = web.arguments()["init_image"]
    np.testing.assert_array_equal(np.asarray(first), np.asarray(SCENE))
    np.testing.assert_array_equal(np.asarray(second), np.asarray(other))


def test_inpainting_the_whole_picture(web: Client) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    answer = web.img2img(
        mask=as_base64(mask), mask_blur=0, inpaint_full_res=False, inpainting_fill=1, denoising_strength=1
    )
    found = web.arguments()
    np.testing.assert_array_equal(np.asarray(found["mask_image"]), np.asarray(mask))
    np.testing.assert_array_equal(np.asarray(found["init_image"]), np.asarray(SCENE))
    assert found["strength"] == 1
    pixels = np.asarray(opened(answer["images"][0]))
    np.testing.assert_array_equal(pixels[:, :32], fake_pictures(7, 1)[0][:, :32])
    np.testing.assert_array_equal(pixels[:, 32:], np.asarray(SCENE)[:, 32:])


def test_inpainting_only_what_is_masked(web: Client) -> None:
    large = Image.fromarray(sample_pictures.scene(200, 300))
    mask = Image.new("L", large.size)
    mask.paste(255, (100, 50, 140, 90))
    answer = web.img2img(
        init_images=[as_base64(large)], mask=as_base64(mask), mask_blur=0, inpaint_full_res_padding=12, **unit()
    )
    found = web.arguments()
    crop = large.crop((88, 38, 152, 102))
    np.testing.assert_array_equal(np.asarray(found["init_image"])[0], np.asarray(crop)[0])  # the inside is filled
    assert np.asarray(found["mask_image"]).sum() == 255 * 40 * 40
    assert found["image"]["canny"].size == (64, 64)
    drawn = opened(answer["images"][0])
    assert drawn.size == large.size
    np.testing.assert_array_equal(np.asarray(drawn)[50:90, 100:140], fake_pictures(7, 1)[0][12:52, 12:52])
    np.testing.assert_array_equal(np.asarray(drawn)[:50], np.asarray(large)[:50])


def test_the_other_side_of_a_mask(web: Client) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    web.img2img(mask=as_base64(mask), mask_blur=0, inpaint_full_res=False, inpainting_mask_invert=1)
    np.testing.assert_array_equal(np.asarray(web.arguments()["mask_image"]), 255 - np.asarray(mask))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_images", []),
        ("init_images", ["not a picture"]),
        ("init_images", ["https://example.org/a.png"]),
        ("init_images", [as_base64(SCENE)] * 2),
        ("resize_mode", 3),
        ("inpainting_fill", 2),
        ("inpainting_mask_invert", 2),
        ("denoising_strength", 1.5),
        ("mask_blur", -1),
        ("width", 10**9),
        ("mask", "/etc/passwd"),
        ("latent_mask", as_base64(SCENE)),
        ("initial_noise_multiplier", 0.5),
        ("enable_hr", True),
    ],
)
def test_what_picture_to_picture_refuses(web: Client, field: str, value: Any) -> None:
    assert field in web.img2img(422, **{field: value})["detail"]
