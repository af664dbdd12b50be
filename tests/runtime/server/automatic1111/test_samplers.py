from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("fastapi")

from controlrt.runtime.errors import RequestError
from controlrt.runtime.samplers import SamplerTable, compile_sampler
from controlrt.runtime.server.automatic1111.samplers import (
    SAMPLERS,
    SCHEDULES,
    find_sampling,
    fraction,
    steps_for,
    steps_from,
)

SD15 = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "timestep_spacing": "leading",
}
"""Of Stable Diffusion 1.5: a config whose grid is not the web UI's."""


def model_sigmas() -> np.ndarray:
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return ((1 - alphas) / alphas) ** 0.5


def table(sampler: str, schedule: str, steps: int = 20) -> SamplerTable:
    return compile_sampler(find_sampling(sampler, schedule, None).scheduler, SD15, steps)


def test_every_sampler_compiles_with_its_own_schedule() -> None:
    for sampler in SAMPLERS:
        found = find_sampling(sampler, "Automatic", 1.0)
        assert (found.sampler, found.schedule) == (sampler, "Automatic")
        assert len(compile_sampler(found.scheduler, SD15, 20, eta=found.eta or 0)) >= 20


@pytest.mark.parametrize("schedule", ["uniform", "normal", "Karras", "exponential", "Polyexponential"])
def test_sigmas_are_those_of_k_diffusion(schedule: str) -> None:
    """Its get_sigmas (steps even in t), get_sigmas_karras with rho 7 and get_sigmas_exponential."""
    known, steps = model_sigmas(), 20
    low, high, ramp = known[0], known[-1], np.linspace(0, 1, steps)
    expected = {
        "Karras": (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        "exponential": np.exp(np.linspace(np.log(high), np.log(low), steps)),
    }
    expected["Polyexponential"] = expected["exponential"]
    uniform = np.exp(np.interp(np.linspace(999, 0, steps), np.arange(1000), np.log(known)))
    sigmas = (1 / table("Euler", schedule).input_scale ** 2 - 1) ** 0.5
    # at fractions of a timestep k-diffusion interpolates the logarithm, diffusers and this project the sigma itself
    np.testing.assert_allclose(sigmas, expected.get(schedule, uniform), rtol=2e-3)


def test_ddim_has_the_grid_of_stable_diffusion() -> None:
    np.testing.assert_array_equal(table("DDIM", "").timesteps, np.arange(0, 1000, 50)[::-1] + 1)


@pytest.mark.parametrize(
    ("name", "schedule", "expected"),
    [
        ("DPM++ 2M Karras", "Automatic", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M Karras", "Exponential", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M", "karras", ("DPM++ 2M", "Karras")),
        ("k_euler_a", None, ("Euler a", "Automatic")),
        ("euler", "SGM Uniform", ("Euler", "SGM Uniform")),
        ("Euler SGMUniform", "", ("Euler", "SGM Uniform")),
        ("DEIS", "Karras", ("DEIS", "Karras")),
        ("UniPCMultistepScheduler", "", ("UniPCMultistepScheduler", "Automatic")),
    ],
)
def test_names(name: str, schedule: str | None, expected: tuple[str, str]) -> None:
    found = find_sampling(name, schedule, None)
    assert (found.sampler, found.schedule) == expected
    compile_sampler(found.scheduler, SD15, 10)


def test_automatic_is_the_samplers_own_schedule() -> None:
    assert find_sampling("DPM++ 2M", None, None).scheduler == find_sampling("DPM++ 2M", "Karras", None).scheduler
    assert find_sampling("Euler", None, None).scheduler == find_sampling("Euler", "Uniform", None).scheduler
    sde = find_sampling("DPM++ 2M SDE", "Automatic", None)
    assert sde.scheduler == find_sampling("DPM++ 2M SDE", "exponential", None).scheduler


@pytest.mark.parametrize(
    ("name", "schedule", "eta", "field"),
    [
        ("DPM fast", None, None, "sampler_name"),
        ("DPM++ 2S a", None, None, "sampler_name"),
        ("Euler", "Align Your Steps", None, "scheduler"),
        ("Euler a", "Karras", None, "scheduler"),
        ("DDIM", "Karras", None, "scheduler"),
        ("Euler a", None, 0.5, "eta"),
    ],
)
def test_what_is_not_here_is_refused_by_name(name: str, schedule: str | None, eta: float | None, field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        find_sampling(name, schedule, eta)
    assert caught.value.parameter == field


def test_eta_is_the_samplers_own() -> None:
    assert find_sampling("DDIM", None, 0.5).eta == 0.5
    assert find_sampling("DDIM", None, None).eta is None
    assert find_sampling("Euler a", None, 1.0).eta is None
    assert find_sampling("Euler", None, 0.7).eta is None  # there is no noise that it could scale
    assert find_sampling("TCD", None, 0.3).eta == 0.3


def test_schedules_are_listed_once() -> None:
    assert len({one.label for one in SCHEDULES}) == len(SCHEDULES)


def test_fraction_runs_as_many_steps_as_are_meant() -> None:
    for steps in range(1, 151):
        for run in range(1, steps + 1):
            assert int(steps * fraction(run, steps)) == run
            assert fraction(run, steps) <= 1


def test_steps_are_the_web_uis() -> None:
    """Its sigmas from steps - int(strength * steps) - 1 on; in hires fix the wanted number is the one that is run."""
    assert steps_from(0.75, 20) == 16
    assert steps_from(1.0, 20) == 20
    assert steps_from(0.0, 20) == 1
    assert steps_for(0.7, 20) == 28
    assert steps_for(1.0, 20) == 20
