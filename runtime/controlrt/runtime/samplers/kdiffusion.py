"""Samplers in sigma, after k-diffusion: Euler, Heun, LMS, KDPM2, the ancestral ones, DPM++ SDE, EDM Euler.

Latents are x = x_0 + sigma eps, and a step follows dx/dsigma = (x - x_0) / sigma (Karras et al. 2022, arXiv 2206.00364,
eq. 1 with s(t) = 1). The model sees x / sqrt(sigma^2 + 1), or x / sqrt(sigma^2 + sigma_data^2) with EDM. Second-order
samplers call the model twice per step, but for the last step: their calls are numbered 0, 1, 1, 2, 2, ... by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError, UnknownNameError
from controlrt.runtime.samplers.sampler import BETAS, SPREAD, Request, Sampler, predict_at
from controlrt.runtime.samplers.schedule import NoiseSchedule, karras_sigmas, sigma_schedule, spaced, spread_sigmas
from controlrt.runtime.samplers.table import CLIPPED, LATENTS, NOISE, OUTPUT, Array, Form, Steps, kept, where


def _euler(request: Request) -> Steps:
    """Karras et al. 2022, algorithm 2 without churn and correction."""
    schedule = NoiseSchedule(request.config, finite=True)
    timesteps, sigmas = _grid(request, schedule)
    sigma, following = sigmas[:-1], sigmas[1:]
    x_0, scale = predict_at(request.config["prediction_type"], sigma)
    if request.config["timestep_type"] == "continuous" and request.config["prediction_type"] == "v_prediction":
        timesteps = 0.25 * np.log(sigma)
        if request.timesteps is not None:
            raise request.refuse("timesteps cannot be given for continuous ones", "set timestep_type discrete")
        plain = request.sigmas is None and sigma_schedule(request.config) is None
        if request.config["interpolation_type"] == "log_linear" and plain:
            raise request.refuse(
                "interpolation_type log_linear with continuous timesteps is one step too long in diffusers",
                "set use_karras_sigmas True, or timestep_type discrete",
            )
    return Steps(
        timesteps=timesteps,
        input_scale=scale,
        latents=LATENTS + (following - sigma) * _slope(x_0, sigma),
        noise_scale=_noise_scale(request, sigmas),
        start=_start(sigma),
    )


def _euler_ancestral(request: Request) -> Steps:
    """Euler to sigma_down and noise up to sigma' (k-diffusion's ``sample_euler_ancestral``)."""
    schedule = NoiseSchedule(request.config, finite=True)
    timesteps, sigmas = _grid(request, schedule)
    sigma, following = sigmas[:-1], sigmas[1:]
    x_0, scale = predict_at(request.config["prediction_type"], sigma)
    up, down = _ancestral(sigma, following)
    return Steps(
        timesteps=timesteps,
        input_scale=scale,
        latents=LATENTS + (down - sigma) * _slope(x_0, sigma) + up * NOISE,
        draws=True,
        noise_scale=_noise_scale(request, sigmas),
        start=_start(sigma),
    )


def _lms(request: Request) -> Steps:
    """Linear multistep in sigma: the slope as a polynomial through the last four (k-diffusion's ``sample_lms``)."""
    schedule = NoiseSchedule(request.config)
    timesteps, sigmas = _grid(request, schedule, bounded_karras=False)
    n = len(timesteps)
    sigma, following = sigmas[:-1], sigmas[1:]
    x_0, scale = predict_at(request.config["prediction_type"], sigma)
    slopes = [_slope(x_0, sigma), *(kept(f"slope {i}") for i in range(1, 4))]
    # as in diffusers, a run that begins late weighs its first slopes as if there had been more
    order = np.minimum(np.arange(n) + 1, 4)
    nodes = np.stack([sigma[np.maximum(np.arange(n) - i, 0)] for i in range(4)])
    latents = LATENTS
    for one, slope in enumerate(slopes):
        weight = np.where(order > one, _integral_of_basis(one, nodes, order, sigma, following), 0)
        latents = latents + weight * slope
    return Steps(
        timesteps=timesteps,
        input_scale=scale,
        latents=latents,
        keep={f"slope {i}": slopes[i - 1] for i in range(1, 4)},
        noise_scale=_noise_scale(request, sigmas),
        start=_start(sigma),
    )


def _integral_of_basis(one: int, nodes: Array, order: NDArray[np.intp], low: Array, high: Array) -> Array:
    """Integral from low to high of the Lagrange polynomial that is 1 at ``nodes[one]``, 0 at the other nodes in use."""
    total = np.zeros_like(low)
    with np.errstate(all="ignore"):
        for point in (-((1 / 3) ** 0.5), (1 / 3) ** 0.5):  # Gauss-Legendre, exact up to degree three
            tau = (low + high) / 2 + (high - low) / 2 * point
            value = np.ones_like(low)
            for other in range(4):
                if other != one:
                    value *= np.where(order > other, (tau - nodes[other]) / (nodes[one] - nodes[other]), 1)
            total += value * (high - low) / 2
    return total


def _heun(request: Request) -> Steps:
    """Karras et al. 2022, algorithm 2 without churn: Euler, and again with the mean of both slopes."""
    config, schedule = request.config, NoiseSchedule(request.config)
    timesteps, sigmas = _grid(request, schedule)
    step, second = _calls(len(timesteps))
    sigma, following = sigmas[step], sigmas[step + 1]
    here = np.where(second, following, sigma)
    x_0, scale = predict_at(config["prediction_type"], here)
    clip = None
    if config["clip_sample"]:
        x_0, clip = CLIPPED, (x_0, float(config["clip_sample_range"]))
    slope = _slope(x_0, here)
    origin = where(second, kept("latents"), LATENTS)
    mean = where(second, (kept("slope") + slope) / 2, slope)
    return Steps(
        timesteps=timesteps[step + second],
        input_scale=scale,
        latents=origin + (following - sigma) * mean,
        keep={"latents": origin, "slope": slope},
        clip=clip,
        noise_scale=_noise_scale(request, sigmas),
        start=_start(sigma),
    )


def _kdpm2(request: Request, *, ancestral: bool = False) -> Steps:
    """DPM-Solver-2 with the midpoint in log sigma (Karras et al. 2022, algorithm 2's other choice)."""
    schedule = NoiseSchedule(request.config)
    timesteps, sigmas = _grid(request, schedule, rounded_karras=True)
    step, second = _calls(len(timesteps))
    sigma, following = sigmas[step], sigmas[step + 1]
    up, down = _ancestral(sigma, following) if ancestral else (np.zeros_like(sigma), following)
    middle = np.sqrt(sigma * down)
    here = np.where(second, middle, sigma)
    x_0, scale = predict_at(request.config["prediction_type"], here)
    origin = where(second, kept("latents"), LATENTS)
    latents = origin + np.where(second, down - sigma, middle - sigma) * _slope(x_0, here)
    return Steps(
        timesteps=np.where(second, schedule.timestep_of(middle), timesteps[step]),
        input_scale=scale,
        latents=latents + np.where(second, up, 0) * NOISE,
        keep={"latents": origin},
        draws=second & ancestral,
        noise_scale=_noise_scale(request, sigmas),
        start=_start(sigma),
    )


def _kdpm2_ancestral(request: Request) -> Steps:
    """As KDPM2, to sigma_down and noised up again."""
    return _kdpm2(request, ancestral=True)


def _dpmpp_sde(request: Request) -> Steps:
    """DPM-Solver++ (SDE) of k-diffusion: both calls of a step share one Brownian path.

    The increment over a whole step is the sum of those over its halves, so the second call's noise is the first call's,
    kept, and a new one, each by the root of its share. diffusers draws the path from a Brownian tree (torchsde) with
    a seed of its own; here it comes from the call's generator. Same law, other pictures.
    """
    schedule = NoiseSchedule(request.config)
    timesteps, sigmas = _grid(request, schedule, bounded_karras=False)
    step, second = _calls(len(timesteps))
    sigma, following = sigmas[step], sigmas[step + 1]
    middle = np.sqrt(sigma * following)
    here = np.where(second, middle, sigma)
    x_0, scale = predict_at(request.config["prediction_type"], here)
    origin = where(second, kept("latents"), LATENTS)
    up, down = _ancestral(sigma, np.where(second, following, middle))
    share = (sigma - middle) / np.where(sigma > following, sigma - following, 1)
    path = where(second, np.sqrt(share) * kept("noise") + np.sqrt(np.maximum(1 - share, 0)) * NOISE, NOISE)
    draws = following > 0
    return Steps(
        timesteps=np.where(second, schedule.timestep_of(middle), timesteps[step]),
        input_scale=scale,
        latents=(down / sigma) * origin + (1 - down / sigma) * x_0 + where(draws, up * path, Form({})),
        keep={"latents": origin, "noise": where(draws, NOISE, Form({}))},
        draws=draws,
        noise_scale=_noise_scale(request, sigmas),
        start=_start(sigma),
    )


def _edm_euler(request: Request) -> Steps:
    """Euler with EDM's preconditioning (Karras et al. 2022, table 1, last column)."""
    timesteps, sigmas, x_0, scale = edm(request)
    sigma, following = sigmas[:-1], sigmas[1:]
    return Steps(
        timesteps=timesteps,
        input_scale=scale,
        latents=LATENTS + (following - sigma) * _slope(x_0, sigma),
        noise_scale=(request.config["sigma_max"] ** 2 + 1) ** 0.5,
        start=_start(sigma),
    )


def edm(request: Request) -> tuple[Array, Array, Form, Array]:
    """EDM's timesteps (c_noise), sigmas with the final one, x_0 and input scale (c_in)."""
    config = request.config
    low, high, data = (float(config[key]) for key in ("sigma_min", "sigma_max", "sigma_data"))
    if not low < high:
        raise ParameterError("sigma_min", low, f"less than sigma_max ({high:g})")
    ramp = np.linspace(0, 1, request.steps)
    if config["sigma_schedule"] == "karras":
        sigma = karras_sigmas(ramp, low, high, float(config["rho"]))
    elif config["sigma_schedule"] == "exponential":
        # at one step diffusers starts from the low end here
        sigma = np.exp(np.linspace(np.log(low), np.log(high), request.steps))[::-1].copy()
    else:
        raise UnknownNameError("sigma_schedule", str(config["sigma_schedule"]), ["karras", "exponential"])
    final = _final(request, low if request.sampler == "EDMDPMSolverMultistepScheduler" else sigma[-1])
    sign = {"epsilon": 1.0, "v_prediction": -1.0}.get(config["prediction_type"])
    if sign is None:
        raise UnknownNameError("prediction_type", str(config["prediction_type"]), ["epsilon", "v_prediction"])
    scale = 1 / np.sqrt(sigma**2 + data**2)
    x_0 = (data * scale) ** 2 * LATENTS + sign * sigma * data * scale * OUTPUT
    return 0.25 * np.log(sigma), np.append(sigma, final), x_0, scale


def _grid(
    request: Request, schedule: NoiseSchedule, *, rounded_karras: bool = False, bounded_karras: bool = True
) -> tuple[Array, Array]:
    """Timesteps (steps,) and sigmas (steps + 1,), the final one included.

    Without ``bounded_karras`` Karras sigmas go from end to end of the grid, whatever sigma_min and sigma_max say.
    """
    config, spread = request.config, sigma_schedule(request.config)
    if request.sigmas is not None:
        if spread is not None:
            raise request.refuse(f"sigmas cannot be given together with {spread}", "leave one of them out")
        return schedule.timestep_of(request.sigmas[:-1]), request.sigmas
    timesteps = spaced(config, request.steps) if request.timesteps is None else request.timesteps
    if request.timesteps is not None and spread is not None:
        raise request.refuse(f"timesteps cannot be given together with {spread}", "leave one of them out")
    sigmas = schedule.sigma_at(timesteps)
    interpolation = config.get("interpolation_type", "linear")
    if interpolation == "log_linear":
        logs = schedule.log_sigmas
        sigmas = np.exp(np.linspace(logs[-1], logs[0], request.steps + 1))
    elif interpolation != "linear":
        raise UnknownNameError("interpolation_type", str(interpolation), ["linear", "log_linear"])
    if spread is not None:
        bounded = bounded_karras or spread != "use_karras_sigmas"
        sigmas = spread_sigmas(spread, config, sigmas[-1], sigmas[0], request.steps, bounded=bounded)
        timesteps = schedule.timestep_of(sigmas)
        if rounded_karras and spread == "use_karras_sigmas":
            timesteps = np.round(timesteps)
    return timesteps, np.append(sigmas, _final(request, schedule.sigmas[0]))[: request.steps + 1]


def _final(request: Request, sigma_min: float) -> float:
    """The sigma where the run ends."""
    kind = request.config.get("final_sigmas_type", "zero")
    if kind not in ("zero", "sigma_min"):
        raise UnknownNameError("final_sigmas_type", str(kind), ["zero", "sigma_min"])
    return 0.0 if kind == "zero" else float(sigma_min)


def _calls(steps: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The step of each model call of a second-order sampler, and whether it is the step's second call."""
    call = np.arange(2 * steps - 1)
    return call // 2, call % 2 == 1


def _slope(x_0: Form, sigma: Array) -> Form:
    return (LATENTS - x_0) / sigma


def _ancestral(sigma: Array, following: Array) -> tuple[Array, Array]:
    """sigma_up and sigma_down, whose squares sum to that of the following sigma."""
    up = np.sqrt(np.maximum(following**2 * (sigma**2 - following**2) / sigma**2, 0))
    return up, np.sqrt(np.maximum(following**2 - up**2, 0))


def _noise_scale(request: Request, sigmas: Array) -> float:
    """Standard deviation of the starting latents."""
    spread_over_all = request.config["timestep_spacing"] in ("linspace", "trailing")
    return float(sigmas.max() if spread_over_all else np.sqrt(sigmas.max() ** 2 + 1))


def _start(sigma: Array) -> tuple[Array, Array]:
    return np.ones_like(sigma), sigma


_GRID = {**BETAS, "timestep_spacing": "linspace", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
EDM: Mapping[str, Any] = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
"""Options that the EDM samplers share."""

SAMPLERS = (
    Sampler(
        name="EulerDiscreteScheduler",
        options={
            **_GRID,
            **SPREAD,
            **_ZERO_SNR,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
        },
        compile=_euler,
        takes=frozenset({"timesteps", "sigmas"}),
    ),
    Sampler(name="EulerAncestralDiscreteScheduler", options={**_GRID, **_ZERO_SNR}, compile=_euler_ancestral),
    Sampler(name="LMSDiscreteScheduler", options={**_GRID, **SPREAD}, compile=_lms),
    Sampler(
        name="HeunDiscreteScheduler",
        options={**_GRID, **SPREAD, **_SD_BETAS, "clip_sample": False, "clip_sample_range": 1.0},
        compile=_heun,
        takes=frozenset({"timesteps"}),
        order=2,
    ),
    Sampler(name="KDPM2DiscreteScheduler", options={**_GRID, **SPREAD, **_SD_BETAS}, compile=_kdpm2, order=2),
    Sampler(
        name="KDPM2AncestralDiscreteScheduler",
        options={**_GRID, **SPREAD, **_SD_BETAS},
        compile=_kdpm2_ancestral,
        order=2,
    ),
    Sampler(
        name="DPMSolverSDEScheduler",
        options={**_GRID, **SPREAD, **_SD_BETAS},
        compile=_dpmpp_sde,
        order=2,
    ),
    Sampler(name="EDMEulerScheduler", options=EDM, compile=_edm_euler),
)
