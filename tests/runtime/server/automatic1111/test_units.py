"""Units of the ControlNet extension over the web UI's interface, on a service that draws noise."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from webui_client import LINES, SCENE, Client, as_base64, bundle, opened, unit

from controlrt.runtime.errors import RequestError
from controlrt.runtime.server.automatic1111.units import find_control


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


def test_no_model_name_takes_long() -> None:
    started = time.process_time()
    with pytest.raises(RequestError):
        find_control(" " * 50_000 + "x" + " [" * 20_000, bundle("canny"), "model")
    assert time.process_time() - started < 0.5
