"""Noise levels of diffusers' schedulers, against what these draw."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

from controlrt.perf.peers.noise_levels import noise_levels, require_sampler
from controlrt.runtime.errors import ControlRTError
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
    levels = noise_levels(CONFIG, sampler, steps)
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


@pytest.mark.parametrize(
    ("sampler", "steps", "less"), [("DDIM SGM Uniform", 2, 0.0023), ("DDIM", 2, 0.15), ("DDIM", 20, 0.0041)]
)
def test_how_much_smaller_latents_begin_that_are_noise_times_sigma(sampler: str, steps: int, less: float) -> None:
    """The figures that perf/README.md and the contender's module have."""
    first = noise_levels(CONFIG, sampler, steps)[0]
    assert 1 - first / (first**2 + 1) ** 0.5 == pytest.approx(less, rel=0.05)


def test_another_sampler_is_refused() -> None:
    for name in ("DDIM", "Euler Karras", "DDIM SGM Uniform"):
        require_sampler(name)
    with pytest.raises(ControlRTError, match=r"DDIM and Euler, not with DPM\+\+ 2M"):
        require_sampler("DPM++ 2M")
