"""Hires fix over the web UI's interface, on a service that draws noise."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from webui_client import SCENE, SMALL, Client, as_base64, opened, unit

from controlrt.runtime.server.automatic1111.samplers import find_sampling
from fake_service import fake_pictures


def test_hires_fix_draws_twice(web: Client) -> None:
    answer = web.txt2img(
        prompt="a",
        enable_hr=True,
        hr_scale=2,
        hr_upscaler="Nearest",
        denoising_strength=0.5,
        steps=10,
        hr_second_pass_steps=6,
        hr_prompt="b",
        hr_sampler_name="DDIM",
        batch_size=2,
        **unit(hr_option="High res only"),
    )
    first, second = (dict(request.arguments) for request in web.service.requests)
    assert (first["width"], first["num_inference_steps"], first["prompt"]) == (64, 10, "a")
    assert "image" not in first
    assert (second["width"], second["height"], second["prompt"]) == (128, 128, "b")
    assert second["num_inference_steps"] == 12
    assert second["strength"] == 6 / 12
    assert second["seed"] == first["seed"] == [7, 8]
    assert second["scheduler"] == find_sampling("DDIM", None, None).scheduler
    assert second["image"]["canny"].size == (128, 128)
    for start, drawn in zip(second["init_image"], fake_pictures(7, 2), strict=True):
        np.testing.assert_array_equal(np.asarray(start), drawn.repeat(2, axis=0).repeat(2, axis=1))
    assert [opened(text).size for text in answer["images"][:2]] == [(128, 128)] * 2


def test_large_pictures_take_the_tiles_that_the_bundle_has(web: Client) -> None:
    manifest = web.service.bundles["sd15"]
    assert not any("vae_tiling" in drawn for drawn in drawn_arguments(web))
    tiled = msgspec.structs.replace(manifest, profile=msgspec.structs.replace(manifest.profile, vae_tile=64))
    web.service.bundles = {**web.service.bundles, "sd15": tiled}
    assert [drawn["vae_tiling"] for drawn in drawn_arguments(web)] == [True] * 3


def drawn_arguments(web: Client) -> list[Any]:
    """Of both passes of hires fix, and of a picture to start from."""
    web.service.requests.clear()
    web.txt2img(enable_hr=True, hr_scale=2, hr_upscaler="Nearest")
    web.img2img(init_images=[as_base64(SCENE)])
    return [request.arguments for request in web.service.requests]


def test_hires_fix_to_a_size_cuts_off_what_is_more(web: Client) -> None:
    web.txt2img(
        enable_hr=True, hr_resize_x=128, hr_resize_y=64, hr_upscaler="Nearest", **unit(hr_option="Low res only")
    )
    first, second = (dict(request.arguments) for request in web.service.requests)
    drawn = fake_pictures(7, 1)[0].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(np.asarray(second["init_image"][0]), drawn[32:96])
    assert "image" in first
    assert "image" not in second


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hr_upscaler", "Latent"),
        ("hr_upscaler", "R-ESRGAN 4x+"),
        ("hr_scale", 3),
        ("hr_resize_x", 256),
        ("denoising_strength", 0),
        ("denoising_strength", 0.003),
        ("hr_checkpoint_name", "missing"),
        ("hr_sampler_name", "DPM fast"),
        ("hr_scheduler", "Simple"),
    ],
)
def test_what_hires_fix_refuses_before_it_draws(web: Client, field: str, value: Any) -> None:
    detail = web.txt2img(422, **{"enable_hr": True, "hr_upscaler": "Lanczos", field: value})["detail"]
    assert field.removeprefix("hr_").split("_")[0] in detail
    assert not web.service.requests


def test_interrupted_between_its_passes_hires_fix_gives_the_first(web: Client) -> None:
    web.service.step_seconds = 0.02

    async def interrupted(client: Any) -> Any:
        call = {**SMALL, "steps": 5, "seed": 7, "enable_hr": True, "hr_upscaler": "Lanczos"}
        drawing = asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=call))
        while len(web.service.jobs) < 2:
            await asyncio.sleep(0.01)
        await client.post("/sdapi/v1/interrupt")
        return (await drawing).json()

    answer = web.run(interrupted)
    assert answer["images"] == []
    assert json.loads(answer["info"])["all_seeds"] == []


def test_a_server_that_drains_in_between_draws_the_second_pass(web: Client) -> None:
    web.service.step_seconds = 0.02

    async def draining(client: Any) -> Any:
        call = {**SMALL, "steps": 3, "seed": 7, "enable_hr": True, "hr_upscaler": "Lanczos"}
        drawing = asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=call))
        while not web.service.jobs:
            await asyncio.sleep(0.001)
        await web.service.drain()
        return await drawing

    answer = web.run(draining)
    assert answer.status_code == 200
    assert opened(answer.json()["images"][0]).size == (128, 128)
    assert [job.status for job in web.service.jobs.values()] == ["done", "done"]
