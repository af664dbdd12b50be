"""What is chosen on the page, as arguments of a call and as code."""

from __future__ import annotations

import inspect
import shlex
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlrt.runtime.errors import ParameterError
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.server.ui.choices import Choices, differences, parse_size, sizes
from controlrt.runtime.server.ui.snippets import CONTROL_FILE, PICTURE_FILE, curl_code, python_code

HINT = Image.fromarray(np.zeros((64, 128, 3), np.uint8))
PLAIN: dict[str, Any] = {"bundle": "sd15", "prompt": "a fox", "width": 128, "height": 64}
FULL: dict[str, Any] = {
    **PLAIN,
    "prompt": 'it\'s a "fox" @home; $PATH `ls` <here>\nline two',
    "negative_prompt": "=blurry",
    "control": "canny",
    "scale": 0.75,
    "start": 0.1,
    "end": 0.6,
    "sampler": "DPM++ 2M Karras",
    "steps": 12,
    "guidance": 6.5,
    "seed": 2**32 - 1,
}


def test_arguments_are_those_of_the_pipeline() -> None:
    arguments = Choices(**FULL).arguments(HINT)
    inspect.signature(ControlNetPipeline.prepare).bind(None, **arguments)
    assert arguments == {
        "prompt": FULL["prompt"],
        "negative_prompt": "=blurry",
        "image": {"canny": HINT},
        "controlnet_conditioning_scale": 0.75,
        "control_guidance_start": 0.1,
        "control_guidance_end": 0.6,
        "scheduler": "DPM++ 2M Karras",
        "num_inference_steps": 12,
        "guidance_scale": 6.5,
        "seed": 2**32 - 1,
        "width": 128,
        "height": 64,
    }


def test_what_is_not_chosen_is_not_said() -> None:
    arguments = Choices(**PLAIN).arguments(HINT)
    assert arguments.keys() == {"prompt", "num_inference_steps", "guidance_scale", "seed", "width", "height"}


def test_tiles_are_asked_for_where_the_bundle_has_them() -> None:
    assert Choices(**PLAIN, vae_tiling=True).arguments(HINT)["vae_tiling"] is True


@pytest.mark.parametrize("name", ["scale", "steps", "guidance", "seed"])
def test_an_empty_field_is_named(name: str) -> None:
    with pytest.raises(ParameterError, match=f"{name} is 'empty', but must be a number"):
        Choices(**{**FULL, name: None})


def test_differences_name_what_differs() -> None:
    assert differences(Choices(**FULL), Choices(**{**FULL, "seed": 3, "scale": 1.0})) == {
        "scale": (0.75, 1.0),
        "seed": (2**32 - 1, 3),
    }


@pytest.mark.parametrize("text", ["512x512", "512-1024x512", "512-640x384-768,1024x1024"])
def test_sizes_are_within_the_profile(text: str) -> None:
    profile = ShapeProfile.parse(text)
    found = [parse_size(size) for size in sizes(profile)]
    assert found[0] == profile.default_size
    assert len(set(found)) == len(found)
    for width, height in found:
        profile.check(width, height, 1)


def test_no_more_sizes_than_a_list_can_hold() -> None:
    assert len(sizes(ShapeProfile.parse("64-2048x64-2048"), most=20)) == 20


@pytest.mark.parametrize("text", ["", None, "512", "512x", "axb", "512x512x512", "-1x5"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("given", [PLAIN, FULL], ids=["plain", "full"])
def test_the_python_code_makes_the_call(given: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Recorded:
        def __init__(self, path: str) -> None:
            self.path = path

        load = classmethod(lambda cls, path: cls(path))

        def __enter__(self) -> Recorded:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __call__(self, prompt: str, **arguments: Any) -> Any:
            calls.append((self.path, {"prompt": prompt, **arguments}))
            return type("Output", (), {"images": [HINT]})

    monkeypatch.setattr("controlrt.runtime.ControlNetPipeline", Recorded, raising=False)
    monkeypatch.chdir(tmp_path)
    HINT.save(CONTROL_FILE)
    choices = Choices(**given)
    exec(compile(python_code(choices), "snippet", "exec"), {})
    [(path, arguments)] = calls
    if "image" in arguments:
        arguments["image"] = {name: np.asarray(picture).tolist() for name, picture in arguments["image"].items()}
    expected = choices.arguments(HINT)
    if "image" in expected:
        expected["image"] = {"canny": np.asarray(HINT).tolist()}
    assert path == "sd15"
    assert arguments == expected
    assert (tmp_path / PICTURE_FILE).exists()


@pytest.mark.parametrize("given", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("asks_for_key", [False, True])
def test_the_command_asks_for_the_same(given: dict[str, Any], asks_for_key: bool) -> None:
    schemas = pytest.importorskip("controlrt.runtime.server.schemas", reason="without [serve] there is no server")
    choices = Choices(**given)
    code = curl_code(choices, "http://127.0.0.1:8000/", asks_for_key=asks_for_key)
    words = shlex.split(code)
    assert words[0] == "curl"
    assert "http://127.0.0.1:8000/v1/generate" in words
    assert ('"X-API-Key: $CONTROLRT_API_KEY"' in code) == asks_for_key
    fields = [words[place + 1].split("=", 1) for place, word in enumerate(words) if word == "--form-string"]
    body = schemas.GenerateRequest.model_validate(dict(fields))
    said = {name: getattr(body, name) for name in body.model_fields_set}
    assert said.pop("model") == "sd15"
    assert said == choices.arguments()
    files = [words[place + 1] for place, word in enumerate(words) if word == "-F"]
    assert files == ([f"image.canny=@{CONTROL_FILE}"] if choices.control else [])
