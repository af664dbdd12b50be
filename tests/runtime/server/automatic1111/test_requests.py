"""What the web UI's requests come to, over HTTP, on a service that draws noise."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from webui_client import SMALL, Client, bundle, opened

from controlrt.runtime.errors import DrawingError, UnavailableError
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.server.automatic1111.drawings import strip_networks
from controlrt.runtime.server.automatic1111.samplers import find_sampling
from fake_service import fake_pictures


def test_a_prompt_reaches_the_pipeline(web: Client) -> None:
    answer = web.txt2img(
        prompt="a (cat:1.2)",
        negative_prompt="dog",
        cfg_scale=5,
        sampler_name="DPM++ 2M",
        scheduler="Karras",
        batch_size=2,
        override_settings={"CLIP_stop_at_last_layers": 2},
    )
    assert web.arguments() == {
        "prompt": "a (cat:1.2)",
        "negative_prompt": "dog",
        "prompt_syntax": "webui",
        "clip_skip": 1,
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 5,
        "num_images_per_prompt": 2,
        "scheduler": find_sampling("DPM++ 2M", "Karras", None).scheduler,
        "noise": "gpu",
        "seed": [7, 8],
    }
    assert web.service.requests[-1].bundle == "sd15"
    pictures = fake_pictures(7, 2)
    assert len(answer["images"]) == 2
    for text, expected in zip(answer["images"], pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(opened(text)), expected)


def test_what_is_said_of_the_pictures(web: Client) -> None:
    answer = web.txt2img(prompt="a cat", negative_prompt="dog", batch_size=2, sampler_name="Euler a")
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [7, 8]
    assert (info["seed"], info["sampler_name"], info["sd_model_name"]) == (7, "Euler a", "sd15")
    assert info["all_prompts"] == ["a cat"] * 2
    assert info["infotexts"][1] == (
        "a cat\nNegative prompt: dog\nSteps: 4, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7.0, Seed: 8, "
        "Size: 64x64, Model hash: 0000000000, Model: sd15"
    )
    assert opened(answer["images"][1]).info["parameters"] == info["infotexts"][1]
    assert answer["parameters"]["prompt"] == "a cat"
    assert answer["parameters"]["steps"] == 4


def test_iterations_are_batches_with_the_seeds_that_follow(web: Client) -> None:
    answer = web.txt2img(prompt="a", n_iter=2, batch_size=2)
    assert [request.arguments["seed"] for request in web.service.requests] == [[7, 8], [9, 10]]
    assert json.loads(answer["info"])["all_seeds"] == [7, 8, 9, 10]
    np.testing.assert_array_equal(np.asarray(opened(answer["images"][2])), fake_pictures(9, 2)[0])


def test_a_seed_of_minus_one_is_drawn_and_told(web: Client) -> None:
    answers = [web.txt2img(prompt="a", seed=-1) for _ in range(2)]
    seeds = [json.loads(answer["info"])["seed"] for answer in answers]
    assert seeds == [request.arguments["seed"][0] for request in web.service.requests]
    assert seeds[0] != seeds[1]


def test_defaults_are_the_web_uis(web: Client) -> None:
    web.service.bundles = {"sd15": msgspec.structs.replace(bundle(), profile=ShapeProfile.parse("512x512"))}
    web.post("/sdapi/v1/txt2img", {})
    found = web.arguments()
    assert (found["width"], found["height"], found["num_inference_steps"]) == (512, 512, 50)
    assert found["guidance_scale"] == 7
    assert found["scheduler"] == find_sampling("Euler", None, None).scheduler
    assert "negative_prompt" not in found


def test_null_is_as_if_it_were_not_there(web: Client) -> None:
    web.txt2img(prompt="a", negative_prompt=None, styles=None, hr_upscaler=None, scheduler=None, eta=None)
    assert "eta" not in web.arguments()


def test_pictures_are_sent_only_where_they_are_asked_for(web: Client) -> None:
    answer = web.txt2img(prompt="a", send_images=False)
    assert answer["images"] == []
    assert len(json.loads(answer["info"])["infotexts"]) == 1


@pytest.mark.parametrize("chosen", ["jpg", "webp"])
def test_pictures_have_the_format_that_is_set(web: Client, chosen: str) -> None:
    answer = web.txt2img(prompt="a", override_settings={"samples_format": chosen})
    assert opened(answer["images"][0]).format == {"jpg": "JPEG", "webp": "WEBP"}[chosen]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("styles", ["anime"]),
        ("subseed_strength", 0.3),
        ("seed_resize_from_h", 512),
        ("restore_faces", True),
        ("tiling", True),
        ("s_churn", 0.5),
        ("s_noise", 1.1),
        ("s_min_uncond", 2),
        ("refiner_checkpoint", "sdxl_refiner"),
        ("script_name", "x/y/z plot"),
        ("save_images", True),
        ("firstphase_width", 512),
        ("distilled_cfg_scale", 3.5),
        ("controlnet_units", [{"model": "canny"}]),
        ("alwayson_scripts", {"ADetailer": {"args": [True, {"ad_model": "face"}]}}),
        ("alwayson_scripts", {"controlnet": {"args": "x"}}),
        ("sampler_name", "DPM fast"),
        ("scheduler", "Align Your Steps"),
        ("eta", 0.3),
        ("seed", "seven"),
        ("steps", 0),
        ("steps", 61),
        ("batch_size", 5),
        ("n_iter", 9),
        ("width", 100),
        ("width", 10**9),
        ("width", -64),
        ("prompt", "a <lora:other:1>"),
        ("prompt", "a <lora:ink:0.8>"),
        ("negative_prompt", "<hypernet:ink:0.5>"),
        ("override_settings", {"sd_model_checkpoint": "missing"}),
        ("override_settings", {"CLIP_stop_at_last_layers": 0}),
        ("override_settings", {"sd_vae": "other.vae.pt"}),
        ("override_settings", {"randn_source": "TPU"}),
        ("override_settings", {"no_such_setting": 1}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(web: Client, field: str, value: Any) -> None:
    fields = {"sampler_name": "Euler a", field: value}
    detail = web.txt2img(422, **fields)["detail"]
    named = next(iter(value)) if isinstance(value, dict) else field
    assert named in detail
    assert not web.service.requests


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("styles", []),
        ("subseed", 99),
        ("subseed_strength", 0.0),
        ("seed_resize_from_h", -1),
        ("s_tmin", 0.1),
        ("s_tmax", 0),
        ("s_noise", 1.0),
        ("refiner_switch_at", 0.8),
        ("hr_scale", 3),
        ("hr_upscaler", "Latent"),
        ("script_args", []),
        ("do_not_save_grid", True),
        ("alwayson_scripts", {"ADetailer": {"args": [False]}, "animatediff": {"args": [{"enable": False}]}}),
        ("alwayson_scripts", {"ControlNet": {"args": []}}),
        ("override_settings", {"sd_vae": "Automatic", "live_previews_enable": True}),
    ],
)
def test_what_changes_nothing_is_taken(web: Client, field: str, value: Any) -> None:
    web.txt2img(prompt="a", **{field: value})


def test_loras_of_the_bundle_may_be_named_at_their_weight(web: Client) -> None:
    web.txt2img(prompt="a <lora:ink:0.5>cat")
    assert web.arguments()["prompt"] == "a cat"


def test_a_body_that_is_no_object_is_refused(web: Client) -> None:
    assert web.post("/sdapi/v1/txt2img", [1], 422)["detail"]
    assert web.post("/sdapi/v1/options", [1], 422)["detail"]


def test_errors_of_the_service(web: Client) -> None:
    web.service.refusal = UnavailableError("the queue is full", "queue_full", 3)
    answer = web.run(lambda client: client.post("/sdapi/v1/txt2img", json={"prompt": "a", **SMALL}))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "3")
    assert answer.json()["errors"] == "the queue is full"
    web.service.refusal, web.service.failure = None, DrawingError("it broke")
    assert web.txt2img(500, prompt="a", n_iter=2)["detail"] == "it broke"
    assert all(job.status != "running" for job in web.service.jobs.values())


@pytest.mark.parametrize("text", ["<a:" * 30_000, "<lora:ink:" * 9_000, "<" * 90_000, "<a:b:c:" + ":" * 90_000])
def test_no_prompt_takes_long(text: str) -> None:
    """It is read in the event loop."""
    started = time.process_time()
    assert strip_networks(text, bundle(), "prompt") == text
    assert time.process_time() - started < 0.5
