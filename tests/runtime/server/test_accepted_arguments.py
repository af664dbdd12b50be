"""What the interfaces ask of the service are arguments that the pipeline takes: names never drift apart."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")

import sample_pictures
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.drawing import Drawing
from controlrt.runtime.server import openai
from controlrt.runtime.server.automatic1111.drawings import read_drawing
from controlrt.runtime.server.automatic1111.fields import Img2Img, Txt2Img
from controlrt.runtime.server.automatic1111.options import Options
from controlrt.runtime.server.settings import Settings

pytestmark = pytest.mark.bundle
SCENE = Image.fromarray(sample_pictures.scene(512, 512))
MASK = Image.new("L", (512, 512))
MASK.paste(255, (128, 128, 384, 384))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def base64_of(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


def units(demo: ControlNetPipeline, **fields: Any) -> dict[str, Any]:
    layers = {control.name: control.layers for control in demo.bundle.manifest.controls}
    args = [
        {
            "model": "canny",
            "module": "invert",
            "weight": 0.8,
            "guidance_end": 0.9,
            "control_mode": "ControlNet is more important",
            **fields,
        },
        {"model": "mask", "advanced_weighting": [0.5] * layers["mask"], **fields},
    ]
    return {"controlnet": {"args": args}}


def webui_drawings(demo: ControlNetPipeline, call: Txt2Img | Img2Img) -> list[Drawing]:
    read = read_drawing(call, Options(bundle="demo"), {"demo": demo.bundle.manifest}, Settings())
    return [demo.prepare(**iteration.first.arguments) for iteration in read.iterations]


def test_text_to_image_of_the_web_ui(demo: ControlNetPipeline) -> None:
    call = Txt2Img(
        prompt="a (cat:1.2)",
        negative_prompt="dog",
        seed=3,
        steps=6,
        batch_size=2,
        n_iter=2,
        eta=0.5,
        sampler_name="DDIM",
        alwayson_scripts=units(demo, image=base64_of(SCENE), effective_region_mask=base64_of(MASK)),
    )
    first, second = webui_drawings(demo, call)
    assert (first.seed, second.seed) == ([3, 4], [5, 6])
    assert (first.layout.batch, len(first.table)) == (2, 6)
    assert [use.control.name for use in first.uses] == ["canny", "mask"]
    assert first.uses[0].conditional
    assert first.uses[1].region is not None
    np.testing.assert_allclose(first.uses[1].scale[0, 0], 0.5)


def test_picture_to_picture_of_the_web_ui(demo: ControlNetPipeline) -> None:
    call = Img2Img(
        init_images=[base64_of(SCENE), base64_of(SCENE)],
        mask=base64_of(MASK),
        denoising_strength=0.5,
        steps=10,
        batch_size=2,
        sampler_name="DPM++ 2M",
        alwayson_scripts=units(demo),
    )
    (drawing,) = webui_drawings(demo, call)
    assert len(drawing.table) == 6  # the web UI's int(0.5 * 10) + 1
    assert drawing.source is not None
    assert drawing.source.masks is not None
    assert len(drawing.source.pictures) == 2
    assert len(drawing.uses) == 2


def test_the_second_pass_of_hires_fix(demo: ControlNetPipeline) -> None:
    size = {"width": 512, "height": 512, "hr_scale": 1.0}
    call = Txt2Img(
        enable_hr=True, steps=8, denoising_strength=0.5, sampler_name="Euler a", batch_size=2, seed=3, **size
    )
    read = read_drawing(call, Options(bundle="demo"), {"demo": demo.bundle.manifest}, Settings())
    second = read.iterations[0].second
    assert second is not None
    drawing = demo.prepare(**second.starting_from((np.asarray(SCENE), np.asarray(SCENE))).arguments)
    assert len(drawing.table) == 8  # all that are asked for, of a schedule of 16
    assert drawing.seed == [3, 4]


def test_generations_and_edits_of_openai(demo: ControlNetPipeline) -> None:
    extra = {
        "negative_prompt": "dog",
        "seed": 3,
        "num_inference_steps": 6,
        "control_image": {"canny": base64_of(SCENE)},
        "controlnet_conditioning_scale": {"canny": 0.8},
        "scheduler": "Euler a",
        "resize": "crop",
    }
    body = openai.ImagesRequest.model_validate({"prompt": "a cat", "n": 2, "size": "512x512", **extra})
    drawing = demo.prepare(**openai.to_request(body, {}, Settings()).arguments)
    assert (drawing.layout.batch, len(drawing.table), drawing.seed) == (2, 6, 3)
    holed = SCENE.copy()
    holed.putalpha(MASK.point(lambda value: 255 - value))
    body = openai.ImagesRequest.model_validate({"prompt": "a cat", "strength": 0.5, **extra})
    drawing = demo.prepare(**openai.to_request(body, {"image": png(SCENE), "mask": png(holed)}, Settings()).arguments)
    assert drawing.source is not None
    np.testing.assert_array_equal(drawing.source.masks[0], np.asarray(MASK) / 255)
