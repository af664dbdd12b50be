"""What the web UI's requests come to, over HTTP, on a service that draws noise."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

import sample_pictures
from controlrt.runtime.errors import DrawingError, RequestError, UnavailableError
from controlrt.runtime.manifest import Lora, Manifest
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.automatic1111.drawings import strip_networks
from controlrt.runtime.server.automatic1111.samplers import find_sampling
from controlrt.runtime.server.automatic1111.units import find_control
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService, fake_manifest, fake_pictures

SMALL = {"width": 64, "height": 64, "steps": 4}
SCENE = Image.fromarray(sample_pictures.scene(64, 64))
LINES = Image.fromarray(np.where(np.arange(64)[:, None, None] % 8 < 2, np.uint8(255), np.zeros((64, 64, 3), np.uint8)))


def as_base64(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def bundle(*controls: str, loras: tuple[Lora, ...] = ()) -> Manifest:
    made = fake_manifest(*controls)
    model = msgspec.structs.replace(made.model, loras=loras)
    profile = ShapeProfile.parse("64x64,128x64,128x128", "1-4")
    return msgspec.structs.replace(made, profile=profile, model=model)


class Client:
    """A client of the web UI's interface upon a fake service; one event loop for both."""

    def __init__(self) -> None:
        self.service = FakeService()
        app = build_app(self.service, Settings(max_pixels=10**6, max_steps=60))
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        self._runner = asyncio.Runner()

    def reset(self) -> None:
        """As it was at the start."""
        self.service.__init__()
        lora = Lora(name="ink", source="ink.safetensors", weight=0.5, sha256="0" * 64)
        self.service.bundles = {"sd15": bundle("canny", "depth", loras=(lora,)), "plain": bundle()}
        self.post("/sdapi/v1/options", {"sd_model_checkpoint": "sd15", "CLIP_stop_at_last_layers": 1})

    def run(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        async def connected() -> Any:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://webui") as client:
                return await work(client)

        return self._runner.run(connected())

    def get(self, path: str) -> Any:
        answer = self.run(lambda client: client.get(path))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        answer = self.run(lambda client: client.post(path, json=body))
        assert answer.status_code == status, answer.text
        return answer.json()

    def txt2img(self, status: int = 200, **fields: Any) -> Any:
        return self.post("/sdapi/v1/txt2img", {**SMALL, "seed": 7, **fields}, status)

    def img2img(self, status: int = 200, **fields: Any) -> Any:
        start = {"init_images": [as_base64(SCENE)], "seed": 7}
        return self.post("/sdapi/v1/img2img", {**SMALL, **start, **fields}, status)

    def arguments(self, index: int = -1) -> dict[str, Any]:
        return dict(self.service.requests[index].arguments)

    def close(self) -> None:
        self._runner.close()


@pytest.fixture(scope="module")
def connected() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


@pytest.fixture
def web(connected: Client) -> Client:
    connected.reset()
    return connected


def unit(**fields: Any) -> dict[str, Any]:
    controlnet = {"args": [{"model": "canny", "image": as_base64(LINES), **fields}]}
    return {"alwayson_scripts": {"controlnet": controlnet}}


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


def test_a_unit_reaches_the_pipeline(web: Client) -> None:
    answer = web.txt2img(
        prompt="a",
        **unit(
            weight=0.8,
            guidance_start=0.1,
            guidance_end=0.9,
            control_mode="My prompt is more important",
            effective_region_mask=as_base64(SCENE.resize((32, 32))),
        ),
    )
    found = web.arguments()
    np.testing.assert_array_equal(np.asarray(found["image"]["canny"]), np.asarray(LINES))
    assert found["controlnet_conditioning_scale"] == {"canny": 0.8}
    assert found["control_guidance_start"] == {"canny": 0.1}
    assert found["control_guidance_end"] == {"canny": 0.9}
    assert found["control_mode"] == {"canny": "prompt"}
    assert found["control_region"]["canny"].size == (64, 64)
    assert len(answer["images"]) == 2
    np.testing.assert_array_equal(np.asarray(opened(answer["images"][1])), np.asarray(LINES))
    assert "ControlNet 0" in json.loads(answer["info"])["infotexts"][0]


def test_several_units(web: Client) -> None:
    args = [
        {"model": "depth [abcdef01]", "input_image": as_base64(LINES), "lowvram": True, "guidance": 0.5},
        {"enabled": False, "model": "openpose", "module": "openpose", "weight": "", "no_such_field": 1},
        {"model": "canny", "image": {"image": as_base64(LINES), "mask": None}, "advanced_weighting": [1.0] * 13},
    ]
    answer = web.txt2img(alwayson_scripts={"ControlNet": {"args": args}}, batch_size=2)
    found = web.arguments()
    assert set(found["image"]) == {"canny", "depth"}
    assert found["control_guidance_end"] == {"depth": 0.5, "canny": 1.0}
    assert found["control_layer_weights"] == {"canny": [1.0] * 13}
    assert len(answer["images"]) == 4
    hidden = {"control_net_no_detectmap": True}
    assert len(web.txt2img(alwayson_scripts={"controlnet": {"args": args}}, override_settings=hidden)["images"]) == 1


def test_a_unit_without_a_picture_takes_that_of_img2img(web: Client) -> None:
    web.img2img(alwayson_scripts={"controlnet": {"args": [{"model": "canny"}]}})
    np.testing.assert_array_equal(np.asarray(web.arguments()["image"]["canny"]), np.asarray(SCENE))


def test_inpainting_by_a_unit_paints_what_its_mask_says(web: Client) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    for where in (
        {"mask": as_base64(mask)},
        {"mask_image": as_base64(mask)},
        {"image": [as_base64(LINES), as_base64(mask)]},
    ):
        web.txt2img(**unit(module="inpaint_only", **where))
        hint = web.arguments()["image"]["canny"]
        assert (hint[:, :32] == -1).all()
        np.testing.assert_allclose(hint[:, 32:], np.asarray(LINES)[:, 32:] / 255, atol=1e-6)
    web.img2img(
        mask=as_base64(mask),
        inpaint_full_res=False,
        alwayson_scripts={"controlnet": {"args": [{"model": "canny", "module": "inpaint"}]}},
    )
    assert (web.arguments()["image"]["canny"][:, :32] == -1).all()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": "None"}, "model"),
        ({"model": "openpose"}, "model"),
        ({"module": "openpose_full"}, "module"),
        ({"module": "inpaint"}, "mask"),
        ({"image": ""}, "image"),
        ({"image": ["a", "b", "c"]}, "image"),
        ({"image": "not a picture"}, "image"),
        ({"image": ["a", 1]}, "image"),
        ({"image": 1}, "image"),
        ({"mask": as_base64(SCENE)}, "mask"),
        ({"mask": as_base64(SCENE), "mask_image": as_base64(SCENE)}, "mask"),
        ({"resize_mode": "Squeeze"}, "resize_mode"),
        ({"control_mode": "Magic"}, "control_mode"),
        ({"hr_option": "Sometimes"}, "hr_option"),
        ({"advanced_weighting": [1.0] * 13, "control_mode": 1}, "control_mode"),
        ({"ipadapter_input": ["x"]}, "ipadapter_input"),
        ({"loopback": True}, "loopback"),
        ({"guessmode": True}, "guessmode"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"weight": "much"}, "weight"),
        ({"module": "canny", "processor_res": 4096}, "processor_res"),
        ({"module": "canny", "pixel_perfect": True, "image": as_base64(Image.new("1", (1, 9000)))}, "processor_res"),
        ({"guidance": 0.5, "guidance_end": 0.5}, "guidance_end"),
    ],
)
def test_a_unit_is_done_or_refused(web: Client, fields: dict[str, Any], named: str) -> None:
    detail = web.txt2img(422, **unit(**fields))["detail"]
    assert "alwayson_scripts.controlnet.args[0]" in detail
    assert named in detail
    assert not web.service.requests


def test_a_unit_that_is_no_object_is_refused(web: Client) -> None:
    detail = web.txt2img(422, alwayson_scripts={"controlnet": {"args": [True]}})["detail"]
    assert detail == "alwayson_scripts.controlnet.args[0] is not an object with the fields of a unit"


def test_two_units_for_one_control_are_refused(web: Client) -> None:
    args = [{"model": "canny", "image": as_base64(LINES)}] * 2
    detail = web.txt2img(422, alwayson_scripts={"controlnet": {"args": args}})["detail"]
    assert "args[1].model" in detail


def test_annotators_run_with_their_parameters(web: Client) -> None:
    cv2 = pytest.importorskip("cv2")
    web.txt2img(**unit(module="canny", image=as_base64(SCENE), processor_res=64, threshold_a=50, threshold_b=120))
    edges = cv2.Canny(np.asarray(SCENE), 50, 120)
    np.testing.assert_array_equal(np.asarray(web.arguments()["image"]["canny"])[..., 0], edges)
    assert edges.any()
    web.txt2img(width=128, height=128, **unit(module="canny", image=as_base64(SCENE), pixel_perfect=True))
    assert web.arguments()["image"]["canny"].size == (128, 128)
    answer = web.txt2img(**unit(module="softedge_hed", image=as_base64(SCENE), threshold_a=64))
    assert json.loads(answer["info"])["comments"] == ["softedge_hed is a network; the filter softedge stands in for it"]


def test_without_opencv_the_module_is_refused(web: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    detail = web.txt2img(422, **unit(module="canny"))["detail"]
    assert "args[0].module 'canny' needs cv2" in detail
    body = {"controlnet_module": "canny", "controlnet_input_images": [as_base64(SCENE)]}
    assert "needs cv2" in web.post("/controlnet/detect", body, 422)["detail"]
    web.txt2img(**unit(module="none"))


def test_a_parameter_out_of_its_range_is_the_default(web: Client) -> None:
    web.txt2img(**unit(module="tile_resample", image=as_base64(SCENE), threshold_a=64, threshold_b=64))
    np.testing.assert_array_equal(np.asarray(web.arguments()["image"]["canny"]), np.asarray(SCENE))


def test_progress_skip_and_interrupt(web: Client) -> None:
    web.service.step_seconds = 0.02

    async def watch(client: Any) -> tuple[Any, ...]:
        call = {**SMALL, "steps": 10, "seed": 7, "n_iter": 3, "force_task_id": "task"}
        drawing = asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=call))
        while len(web.service.jobs) < 3 or list(web.service.jobs.values())[2].progress.step < 3:
            await asyncio.sleep(0.01)
        seen = (await client.get("/sdapi/v1/progress")).json()
        bare = (await client.get("/sdapi/v1/progress?skip_current_image=true")).json()
        skipped = await client.post("/sdapi/v1/skip")
        while list(web.service.jobs.values())[1].status != "done":
            await asyncio.sleep(0.01)
        interrupted = await client.post("/sdapi/v1/interrupt")
        return seen, bare, skipped.json(), interrupted.json(), (await drawing).json()

    seen, bare, skipped, interrupted, answer = web.run(watch)
    assert 0 < seen["progress"] < 1
    assert seen["eta_relative"] > 0
    assert seen["state"]["job"] == "task"
    assert (seen["state"]["job_count"], seen["state"]["sampling_steps"]) == (3, 10)
    assert opened(seen["current_image"]).size == (8, 8)
    assert bare["current_image"] is None
    assert (skipped, interrupted) == (None, {})
    seeds = json.loads(answer["info"])["all_seeds"]
    assert 7 not in seeds
    assert 8 in seeds
    assert len(answer["images"]) == len(seeds)
    idle = web.get("/sdapi/v1/progress")
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)


def test_with_nothing_to_do_skip_and_interrupt_do_nothing(web: Client) -> None:
    assert web.post("/sdapi/v1/interrupt", {}) == {}
    assert web.post("/sdapi/v1/skip", {}) is None


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


def test_options_switch_the_bundle_for_all_calls(web: Client) -> None:
    first = web.get("/sdapi/v1/options")
    assert first["sd_model_checkpoint"] == "sd15 [0000000000]"
    assert first["CLIP_stop_at_last_layers"] == 1
    web.post("/sdapi/v1/options", {"sd_model_checkpoint": "plain [0000000000]", "CLIP_stop_at_last_layers": 2.0})
    assert web.get("/sdapi/v1/options")["sd_model_checkpoint"].startswith("plain")
    web.txt2img(prompt="a")
    assert web.service.requests[-1].bundle == "plain"
    assert web.arguments()["clip_skip"] == 1
    assert web.get("/controlnet/model_list") == {"model_list": []}
    web.txt2img(prompt="a", override_settings={"sd_model_checkpoint": "sd15", "randn_source": "CPU"})
    assert web.service.requests[-1].bundle == "sd15"
    assert web.arguments()["noise"] == "cpu"
    assert web.get("/sdapi/v1/options")["sd_model_checkpoint"].startswith("plain")
    keep = {"override_settings_restore_afterwards": False}
    web.txt2img(prompt="a", override_settings={"sd_model_checkpoint": "sd15"}, **keep)
    assert web.get("/sdapi/v1/options")["sd_model_checkpoint"].startswith("sd15")
    assert "no_such" in web.post("/sdapi/v1/options", {"no_such": 1}, 422)["detail"]


def test_options_can_be_sent_back_as_they_came(web: Client) -> None:
    web.post("/sdapi/v1/options", web.get("/sdapi/v1/options"))


def test_lists(web: Client) -> None:
    samplers = {one["name"]: one for one in web.get("/sdapi/v1/samplers")}
    assert "k_euler_a" in samplers["Euler a"]["aliases"]
    assert "Karras" in [one["label"] for one in web.get("/sdapi/v1/schedulers")]
    assert [one["name"] for one in web.get("/sdapi/v1/upscalers")] == ["Lanczos", "Nearest", "None"]
    assert [one["model_name"] for one in web.get("/sdapi/v1/sd-models")] == ["sd15", "plain"]
    assert web.get("/sdapi/v1/loras")[0]["name"] == "ink"
    assert web.get("/sdapi/v1/embeddings") == {"loaded": {}, "skipped": {}}
    for path in ("latent-upscale-modes", "sd-vae", "hypernetworks", "face-restorers", "prompt-styles"):
        assert web.get(f"/sdapi/v1/{path}") == []
    assert web.post("/sdapi/v1/refresh-checkpoints", {}) is None
    assert web.get("/sdapi/v1/scripts")["txt2img"] == ["controlnet"]


def test_lists_of_the_extension(web: Client) -> None:
    assert web.get("/controlnet/version") == {"version": 3}
    assert web.get("/controlnet/model_list") == {"model_list": ["canny [00000000]", "depth [00000000]"]}
    modules = web.get("/controlnet/module_list")
    assert {"none", "canny", "softedge_hed", "tile_resample"} <= set(modules["module_list"])
    sliders = modules["module_detail"]["canny"]["sliders"]
    assert [slider["value"] for slider in sliders] == [512, 100, 200]
    assert modules["module_detail"]["none"]["sliders"] == []
    types = web.get("/controlnet/control_types")["control_types"]
    assert types["Canny"]["default_model"] == "canny [00000000]"
    assert types["Tile"] == {
        "module_list": ["none", "tile_resample", "blur_gaussian"],
        "model_list": ["None"],
        "default_option": "tile_resample",
        "default_model": "None",
    }
    assert types["All"]["model_list"] == ["None", "canny [00000000]", "depth [00000000]"]
    assert web.get("/controlnet/settings")["control_net_unit_count"] > 0


def test_detect(web: Client) -> None:
    body = {"controlnet_module": "invert", "controlnet_input_images": [as_base64(SCENE), as_base64(LINES)]}
    answer = web.post("/controlnet/detect", body)
    assert answer["info"] == "Success"
    np.testing.assert_array_equal(np.asarray(opened(answer["images"][1])), 255 - np.asarray(LINES))
    mask = as_base64(Image.new("L", (64, 64), 255))
    painted = {"controlnet_module": "inpaint", "controlnet_images": [as_base64(SCENE)], "controlnet_masks": [mask]}
    assert np.asarray(opened(web.post("/controlnet/detect", painted)["images"][0])).max() == 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "controlnet_input_images"),
        ({"controlnet_module": "openpose", "controlnet_input_images": ["x"]}, "controlnet_module"),
        ({"controlnet_input_images": ["x"]}, "controlnet_input_images"),
        ({"controlnet_module": "inpaint", "controlnet_input_images": [as_base64(SCENE)]}, "controlnet_masks"),
        ({"controlnet_input_images": [as_base64(SCENE)], "controlnet_masks": [as_base64(SCENE)]}, "controlnet_masks"),
        ({"no_such": 1}, "no_such"),
        (
            {
                "controlnet_module": "canny",
                "controlnet_input_images": [as_base64(SCENE)],
                "controlnet_processor_res": 4096,
            },
            "controlnet_processor_res",
        ),
    ],
)
def test_what_detect_refuses(web: Client, body: dict[str, Any], named: str) -> None:
    assert named in web.post("/controlnet/detect", body, 422)["detail"]


@pytest.mark.parametrize("text", ["<a:" * 30_000, "<lora:ink:" * 9_000, "<" * 90_000, "<a:b:c:" + ":" * 90_000])
def test_no_prompt_takes_long(text: str) -> None:
    """It is read in the event loop."""
    started = time.process_time()
    assert strip_networks(text, bundle(), "prompt") == text
    assert time.process_time() - started < 0.5


def test_no_model_name_takes_long() -> None:
    started = time.process_time()
    with pytest.raises(RequestError):
        find_control(" " * 50_000 + "x" + " [" * 20_000, bundle("canny"), "model")
    assert time.process_time() - started < 0.5
