"""The Python client that people have for the web UI, against a real server on a service that draws noise."""
# ruff: noqa: E402 - much of it is there with the extra [serve] only

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
webuiapi = pytest.importorskip("webuiapi")


import sample_pictures
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.automatic1111.samplers import find_sampling
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService, fake_manifest, fake_pictures
from live_server import serving

SCENE = Image.fromarray(sample_pictures.scene(64, 64))
SMALL = {"width": 64, "height": 64, "steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def service() -> FakeService:
    made = FakeService()
    profile = ShapeProfile.parse("64x64,128x128", "1-4")
    made.bundles = {
        name: msgspec.structs.replace(manifest, profile=profile)
        for name, manifest in {"sd15": fake_manifest("canny", "depth"), "plain": fake_manifest()}.items()
    }
    return made


@pytest.fixture(scope="module")
def api(service: FakeService) -> Iterator[Any]:
    with serving(build_app(service, Settings())) as url:
        yield webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1")


def test_text_to_image_with_all_its_defaults(api: Any, service: FakeService) -> None:
    made = api.txt2img(prompt="a cat", negative_prompt="dog", cfg_scale=6, batch_size=2, **SMALL)
    found = service.requests[-1].arguments
    assert found["scheduler"] == find_sampling("Euler a", None, None).scheduler
    assert (found["guidance_scale"], found["seed"]) == (6, [7, 8])
    np.testing.assert_array_equal(np.asarray(made.images[1]), fake_pictures(7, 2)[1])
    assert made.info["all_seeds"] == [7, 8]
    assert made.parameters["prompt"] == "a cat"


def test_picture_to_picture_and_inpainting(api: Any, service: FakeService) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    made = api.img2img([SCENE], prompt="a", mask_image=mask, denoising_strength=0.5, **SMALL)
    assert made.image.size == (64, 64)
    assert {"init_image", "mask_image", "strength"} <= set(service.requests[-1].arguments)


def test_units(api: Any, service: FakeService) -> None:
    units = [
        webuiapi.ControlNetUnit(image=SCENE, module="none", model="canny [00000000]", weight=0.7),
        webuiapi.ControlNetUnit(image=SCENE, module="invert", model="depth", control_mode=2, guidance_end=0.8),
        webuiapi.ControlNetUnit(enabled=False),
    ]
    made = api.txt2img(prompt="a", controlnet_units=units, **SMALL)
    found = service.requests[-1].arguments
    assert found["controlnet_conditioning_scale"] == {"canny": 0.7, "depth": 1.0}
    assert found["control_mode"] == {"canny": "balanced", "depth": "controlnet"}
    np.testing.assert_array_equal(np.asarray(found["image"]["depth"]), 255 - np.asarray(SCENE))
    assert len(made.images) == 3


def test_hires_fix(api: Any) -> None:
    made = api.txt2img(prompt="a", enable_hr=True, hr_upscaler=webuiapi.HiResUpscaler.Lanczos, **SMALL)
    assert made.image.size == (128, 128)
    with pytest.raises(RuntimeError, match="hr_upscaler"):
        api.txt2img(prompt="a", enable_hr=True, **SMALL)


def test_lists_and_options(api: Any) -> None:
    assert api.util_get_model_names() == ["plain [0000000000]", "sd15 [0000000000]"]
    assert "Euler a" in api.util_get_sampler_names()
    assert "karras" in api.util_get_scheduler_names()
    api.util_set_model("plain")
    assert api.util_get_current_model() == "plain [0000000000]"
    api.set_options({"sd_model_checkpoint": "sd15"})
    assert api.controlnet_model_list() == ["canny [00000000]", "depth [00000000]"]
    assert "canny" in api.controlnet_module_list()
    assert api.controlnet_version() == 3
    assert api.controlnet_detect([SCENE], module="invert").images[0].size == SCENE.size
    assert api.refresh_checkpoints() is None


def test_progress_and_interrupt(api: Any, service: FakeService) -> None:
    api.util_wait_for_ready(0.05)
    service.step_seconds = 0.05
    made: list[Any] = []
    drawing = threading.Thread(target=lambda: made.append(api.txt2img(prompt="a", n_iter=2, **{**SMALL, "steps": 40})))
    drawing.start()
    watcher = webuiapi.WebUIApi(baseurl=api.baseurl)
    seen: list[dict[str, Any]] = [watcher.get_progress()]
    while not seen[-1]["current_image"]:
        time.sleep(0.02)
        seen.append(watcher.get_progress())
    assert watcher.interrupt() == {}
    drawing.join(timeout=10)
    service.step_seconds = 0
    assert 0 < seen[-1]["progress"] < 1
    assert made[0].images == []


def test_what_is_not_supported_is_an_error_of_the_client(api: Any) -> None:
    with pytest.raises(RuntimeError, match="ADetailer"):
        api.txt2img(prompt="a", alwayson_scripts={}, adetailer=[webuiapi.ADetailer(ad_model="face.pt")], **SMALL)
    with pytest.raises(RuntimeError, match="restore_faces"):
        api.txt2img(prompt="a", alwayson_scripts={}, restore_faces=True, **SMALL)
