"""What stable-diffusion.cpp is asked for, by a stand-in for its package."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.noise_levels import noise_levels
from controlrt.perf.peers.specs import StableDiffusionCppSpec
from controlrt.perf.peers.worker import open_drawer

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def call(**changes: Any) -> Call:
    asked: dict[str, Any] = {
        "seed": 5,
        "width": 64,
        "height": 32,
        "steps": 3,
        "sampler": "DDIM",
        "guidance_scale": 7.5,
        "controls": ("canny",),
    }
    return Call(**asked | changes)


class StableDiffusion:
    """Stands in for the package's class; pictures are of the seed's grey, and have a fourth channel as its own do."""

    made: list[dict[str, Any]]
    asked: list[dict[str, Any]]
    reports = 3

    def __init__(self, **options: Any) -> None:
        type(self).made, type(self).asked = [options], []

    def generate_image(self, **options: Any) -> list[Image.Image]:
        self.asked.append(options)
        for step in range(self.reports + 1):
            options["progress_callback"](step, self.reports, 0.1)
        return [Image.new("RGBA", (options["width"], options["height"]), (*[options["seed"]] * 3, 255))]


@pytest.fixture
def drawer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", SimpleNamespace(StableDiffusion=StableDiffusion))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(CONFIG))
    return open_drawer(
        StableDiffusionCppSpec(model=str(tmp_path), controlnet="control.safetensors", precision="bf16", threads=2)
    )


def test_it_draws_what_the_others_draw(drawer: Any, tmp_path: Path) -> None:
    asked = call(batch=2)
    drawn = drawer.draw(asked, record=True)
    assert drawn.pictures.shape == (2, 32, 64, 3)
    assert [picture.flat[0] for picture in drawn.pictures] == pytest.approx([5 / 255, 6 / 255])
    (options,) = StableDiffusion.made
    assert (options["model_path"], options["control_net_path"]) == (str(tmp_path), "control.safetensors")
    assert (options["wtype"], options["n_threads"], options["rng_type"]) == ("bf16", 2, "cpu")
    assert [each["seed"] for each in StableDiffusion.asked] == list(asked.seeds)
    assert [each["prompt"] for each in StableDiffusion.asked] == asked.prompts
    for each, hint in zip(StableDiffusion.asked, asked.hints()["canny"], strict=True):
        np.testing.assert_array_equal(np.asarray(each["control_image"], np.float32) / 255, hint)
        assert (each["width"], each["height"], each["cfg_scale"], each["control_strength"]) == (64, 32, 7.5, 1.0)
        assert [float(level) for level in each["sigmas"].split(",")] == noise_levels(CONFIG, "DDIM", 3)
    seconds = drawn.seconds
    assert len(seconds.steps) == 3
    assert seconds.text + sum(seconds.steps) + seconds.decode <= seconds.total


def test_the_package_takes_what_it_is_asked(drawer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: a stand-in takes everything."""
    drawer.draw(call(), record=False)
    monkeypatch.delitem(sys.modules, "stable_diffusion_cpp")
    package = pytest.importorskip("stable_diffusion_cpp")
    inspect.signature(package.StableDiffusion).bind(**StableDiffusion.made[0])
    inspect.signature(package.StableDiffusion.generate_image).bind(None, **StableDiffusion.asked[0])


def test_steps_that_are_not_reported_are_not_made_up(drawer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion, "reports", 2)
    with pytest.raises(RuntimeError, match="2 steps were reported, of 3"):
        drawer.draw(call(), record=False)


def test_the_noise_is_pytorch_s() -> None:
    """Of one generator for each picture, which is what stable-diffusion.cpp draws from a seed."""
    found = call(batch=2).latents(4, 8)
    expected = [torch.randn((4, 4, 8), generator=torch.Generator().manual_seed(seed)).numpy() for seed in (5, 6)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
