"""What stable-diffusion.cpp is asked for, by a stand-in for its package, and the noise levels that it goes along."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.specs import StableDiffusionCppSpec
from controlrt.perf.peers.stable_diffusion_cpp import sigmas
from controlrt.perf.peers.worker import open_drawer
from controlrt.runtime.samplers.names import find_sampler

CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",
}


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


@pytest.mark.parametrize("sampler", ["DDIM", "Euler"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_euler_s_method_along_the_sigmas_is_diffusers_sampler(sampler: str, steps: int) -> None:
    """On a made-up network: from the same latents, its steps end where diffusers' end."""

    def noise_in(latents: torch.Tensor) -> torch.Tensor:
        return torch.tanh(1.5 * latents.flip(-1)) + 0.1

    found, options = find_sampler(sampler)
    scheduler = getattr(diffusers, found.name).from_config(CONFIG, **options)
    scheduler.set_timesteps(steps)
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 8, 8))).double()
    levels = sigmas(CONFIG, sampler, steps)
    assert len(levels) == steps + 1

    expected = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noise = noise_in(scheduler.scale_model_input(expected, timestep))
        expected = scheduler.step(noise, timestep, expected).prev_sample
    latents = start * (levels[0] ** 2 + 1) ** 0.5
    for level, following in itertools.pairwise(levels):
        latents = latents + (following - level) * noise_in(latents / (level**2 + 1) ** 0.5)
    if sampler == "DDIM":
        latents = latents / (levels[-1] ** 2 + 1) ** 0.5
    torch.testing.assert_close(latents, expected.double(), rtol=1e-4, atol=1e-4)


def test_another_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DDIM and Euler, not with DPM\+\+ 2M"):
        sigmas(CONFIG, "DPM++ 2M", 3)


class StableDiffusion:
    """Stands in for the package's class; pictures are of the seed's grey."""

    made: list[dict[str, Any]]
    asked: list[dict[str, Any]]
    reports = 3

    def __init__(self, **options: Any) -> None:
        type(self).made, type(self).asked = [options], []

    def generate_image(self, **options: Any) -> list[Image.Image]:
        self.asked.append(options)
        for step in range(self.reports + 1):
            options["progress_callback"](step, self.reports, 0.1)
        return [Image.new("RGB", (options["width"], options["height"]), (options["seed"],) * 3)]


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
        assert [float(level) for level in each["sigmas"].split(",")] == sigmas(CONFIG, "DDIM", 3)
    seconds = drawn.seconds
    assert len(seconds.steps) == 3
    assert seconds.text + sum(seconds.steps) + seconds.decode <= seconds.total


def test_steps_that_are_not_reported_are_not_made_up(drawer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion, "reports", 2)
    with pytest.raises(RuntimeError, match="2 steps were reported, of 3"):
        drawer.draw(call(), record=False)


def test_the_noise_is_pytorch_s() -> None:
    """Of one generator for each picture, which is what stable-diffusion.cpp draws from a seed."""
    found = call(batch=2).latents(4, 8)
    expected = [torch.randn((4, 4, 8), generator=torch.Generator().manual_seed(seed)).numpy() for seed in (5, 6)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
