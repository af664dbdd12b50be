"""Samplers on the training timesteps themselves: DDIM, DDPM, PNDM, LCM, TCD.

Latents are x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 the schedule's alphas_cumprod; the model sees them as they
are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError
from controlrt.runtime.samplers.sampler import BETAS, NO_THRESHOLD, Request, Sampler, predict
from controlrt.runtime.samplers.schedule import NoiseSchedule, spaced
from controlrt.runtime.samplers.table import CLIPPED, LATENTS, NOISE, OUTPUT, Array, Form, Steps, kept, select, where

Clip = tuple[Form, float] | None


def _ddim(request: Request) -> Steps:
    """Song et al. 2021, arXiv 2010.02502, eq. 12; eta scales the noise of eq. 16."""
    config, schedule = request.config, NoiseSchedule(request.config)
    timesteps = _trained(request, np.round(spaced(config, request.steps)), schedule)
    now, then = (
        _product_at(schedule, timesteps),
        _product_at(schedule, timesteps - len(schedule) // request.steps, 1.0 if config["set_alpha_to_one"] else None),
    )
    x_0, eps = predict(config["prediction_type"], np.sqrt(now), np.sqrt(1 - now))
    x_0, clip = _clipped(request, x_0)
    deviation = request.eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
    latents = np.sqrt(then) * x_0 + np.sqrt(np.maximum(1 - then - deviation**2, 0)) * eps
    if request.eta > 0:
        latents = latents + deviation * NOISE
    return Steps(timesteps=timesteps, latents=latents, clip=clip, draws=request.eta > 0, start=_start(now))


def _ddpm(request: Request) -> Steps:
    """Ho et al. 2020, arXiv 2006.11239, eq. 7, with the strides that the timesteps leave."""
    config, schedule = request.config, NoiseSchedule(request.config)
    timesteps = request.timesteps
    if timesteps is None:
        timesteps = np.round(spaced(config, request.steps))
    timesteps = _trained(request, timesteps, schedule)
    now = _product_at(schedule, timesteps)
    then = np.append(now[1:], 1.0)
    x_0, _ = predict(config["prediction_type"], np.sqrt(now), np.sqrt(1 - now))
    x_0, clip = _clipped(request, x_0)
    beta = 1 - now / then
    mean = np.sqrt(then) * beta / (1 - now) * x_0 + np.sqrt(now / then) * (1 - then) / (1 - now) * LATENTS
    variance = np.maximum((1 - then) / (1 - now) * beta, 1e-20)
    if config["variance_type"] == "fixed_large":
        variance = beta
    draws = timesteps > 0
    latents = mean + np.where(draws, np.sqrt(variance), 0) * NOISE
    return Steps(timesteps=timesteps, latents=latents, clip=clip, draws=draws, start=_start(now))


def _lcm(request: Request) -> Steps:
    """Luo et al. 2023, arXiv 2310.04378, algorithm 3: to x_0, and noised anew."""
    config, schedule = request.config, NoiseSchedule(request.config)
    timesteps = _trained(request, _distilled(request), schedule)
    now = _product_at(schedule, timesteps)
    then = np.append(now[1:], 1.0)
    x_0, _ = predict(config["prediction_type"], np.sqrt(now), np.sqrt(1 - now))
    x_0, clip = _clipped(request, x_0)
    scaled, data = timesteps * config["timestep_scaling"], 0.5  # boundary condition of appendix C
    denoised = scaled / np.sqrt(scaled**2 + data**2) * x_0 + data**2 / (scaled**2 + data**2) * LATENTS
    latents = np.sqrt(then) * denoised + np.sqrt(1 - then) * NOISE
    return Steps(timesteps=timesteps, latents=latents, clip=clip, draws=_all_but_last(timesteps), start=_start(now))


def _tcd(request: Request) -> Steps:
    """Zheng et al. 2024, arXiv 2402.19159, algorithm 4: to the earlier time s = (1 - eta) t', and noised up to t'."""
    config, schedule = request.config, NoiseSchedule(request.config)
    timesteps = _trained(request, _distilled(request), schedule)
    now = _product_at(schedule, timesteps)
    following = np.append(timesteps[1:], 0.0)
    then = _product_at(schedule, following)
    # in float32, because the floor of a product decides by the last bit
    earlier = _product_at(schedule, np.floor(np.float32(1 - request.eta) * following.astype(np.float32)))
    x_0, eps = predict(config["prediction_type"], np.sqrt(now), np.sqrt(1 - now))
    latents = np.sqrt(earlier) * x_0 + np.sqrt(1 - earlier) * eps
    draws = _all_but_last(timesteps) & (request.eta > 0)
    noised = np.sqrt(then / earlier) * latents + np.sqrt(np.maximum(1 - then / earlier, 0)) * NOISE
    return Steps(timesteps=timesteps, latents=where(draws, noised, latents), draws=draws, start=_start(now))


def _pndm(request: Request) -> Steps:
    """Liu et al. 2022, arXiv 2202.09778: linear multistep (eq. 12) after a Runge-Kutta start or a repeated step."""
    config, schedule, n = request.config, NoiseSchedule(request.config), request.steps
    ascending = np.round(spaced(config, n))[::-1]
    stride = len(schedule) // n
    start = np.zeros(0)
    if config["skip_prk_steps"]:
        # the second timestep is visited twice
        timesteps = np.concatenate([ascending[:-1], ascending[-2:-1], ascending[-1:]])[::-1].copy()
    elif n < 4 or request.begin:
        wrong = "picture to picture" if request.begin else f"{n} steps"
        raise request.refuse(f"its Runge-Kutta start does not work with {wrong}", "set skip_prk_steps True")
    else:
        halves = np.repeat(ascending[-4:], 2) + np.tile([0, stride // 2], 4)
        start = np.repeat(halves[:-1], 2)[1:-1][::-1]
        timesteps = np.concatenate([start, ascending[:-3][::-1]])
    age = request.age(len(timesteps))
    in_start, rebound = (age >= 0) & (age < len(start)), (age == 1) & (len(start) == 0)
    from_t, to_t = timesteps.copy(), timesteps - stride
    from_t[rebound], to_t[rebound] = timesteps[rebound] + stride, timesteps[rebound]
    stage = np.where(in_start, age % 4, 0)
    from_t[in_start] = start[age[in_start] // 4 * 4]
    to_t[in_start] = timesteps[in_start] - np.where(age[in_start] % 2 == 1, 0, stride // 2)
    _trained(request, np.concatenate([timesteps, from_t]), schedule)

    eps = [OUTPUT, kept("eps 1"), kept("eps 2"), kept("eps 3")]
    multistep = select(
        np.where(len(start), 4, np.clip(age, 1, 4)),
        {
            1: where(rebound, (OUTPUT + eps[1]) / 2, OUTPUT),
            2: (3.0 * eps[0] - eps[1]) / 2,
            3: (23.0 * eps[0] - 16.0 * eps[1] + 5.0 * eps[2]) / 12,
            4: (55.0 * eps[0] - 59.0 * eps[1] + 37.0 * eps[2] - 9.0 * eps[3]) / 24,
        },
    )
    so_far = where(stage == 0, OUTPUT / 6, kept("slope") + OUTPUT * np.where(stage == 3, 1 / 6, 1 / 3))
    runge_kutta = where(stage == 3, so_far, OUTPUT)
    output = where(in_start, runge_kutta, multistep)
    first_of_step = ~rebound & (~in_start | (stage == 0))
    origin = where(first_of_step, LATENTS, kept("latents"))

    now = _product_at(schedule, from_t)
    then = _product_at(schedule, to_t, 1.0 if config["set_alpha_to_one"] else None)
    if config["prediction_type"] == "v_prediction":
        output = np.sqrt(now) * output + np.sqrt(1 - now) * origin
    elif config["prediction_type"] != "epsilon":
        raise request.refuse(
            f"prediction_type {config['prediction_type']!r} is not supported", "use another sampler, such as DDIM"
        )
    divisor = now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then)  # eq. 11
    return Steps(
        timesteps=timesteps,
        latents=np.sqrt(then / now) * origin - (then - now) / divisor * output,
        keep={
            **{f"eps {i + 1}": where(first_of_step, eps[i], eps[i + 1]) for i in range(3)},
            "latents": origin,
            **({"slope": so_far} if len(start) else {}),
        },
        start=_start(_product_at(schedule, timesteps)),
    )


def _distilled(request: Request) -> Array:
    """Timesteps of a consistency model: evenly chosen among those it was distilled on."""
    if request.timesteps is not None:
        return request.timesteps
    original, train_steps = request.config["original_inference_steps"], request.config["num_train_timesteps"]
    if request.steps > original:
        raise ParameterError(
            "num_inference_steps", request.steps, f"at most original_inference_steps ({original}) for {request.sampler}"
        )
    grid: Array = (np.arange(1, original + 1) * (train_steps // original) - 1.0)[::-1]
    chosen: Array = grid[np.floor(np.linspace(0, original, request.steps, endpoint=False)).astype(int)]
    return chosen


def _trained(request: Request, timesteps: Array, schedule: NoiseSchedule) -> Array:
    """The timesteps, if the schedule has them all."""
    if timesteps.max() > len(schedule) - 1 or timesteps.min() < 0:
        wrong = timesteps.max() if timesteps.max() > len(schedule) - 1 else timesteps.min()
        raise ParameterError(
            "num_inference_steps",
            request.steps,
            f"such that timestep {wrong:.0f} (steps_offset included) is one of the {len(schedule)} trained for "
            f"{request.sampler}; use other steps or another timestep_spacing",
        )
    return timesteps


def _product_at(schedule: NoiseSchedule, timesteps: Array, final: float | None = None) -> Array:
    """alphas_cumprod at whole timesteps; below zero ``final``, or the first one where that is None."""
    product = schedule.alphas_cumprod
    final = product[0] if final is None else final
    inside = np.clip(timesteps, 0, len(product) - 1).astype(int)
    values: Array = np.where(timesteps >= 0, product[inside], final)
    return values


def _clipped(request: Request, x_0: Form) -> tuple[Form, Clip]:
    """x_0 as the sampler goes on with it, and what the step must clamp for that."""
    if not request.config["clip_sample"]:
        return x_0, None
    return CLIPPED, (x_0, float(request.config["clip_sample_range"]))


def _start(product: Array) -> tuple[Array, Array]:
    return np.sqrt(product), np.sqrt(1 - product)


def _all_but_last(timesteps: Array) -> NDArray[np.bool_]:
    return np.arange(len(timesteps)) < len(timesteps) - 1


_ALPHA = {
    **BETAS,
    **NO_THRESHOLD,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
}
_SPACED = {"steps_offset": 0, "timestep_spacing": "leading"}
_CONSISTENCY = {
    **_ALPHA,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}

SAMPLERS = (
    Sampler(
        name="DDIMScheduler",
        options={**_ALPHA, **_SPACED, "set_alpha_to_one": True},
        compile=_ddim,
        takes=frozenset({"eta"}),
    ),
    Sampler(
        name="DDPMScheduler",
        options={**_ALPHA, **_SPACED, "variance_type": "fixed_small"},
        compile=_ddpm,
        takes=frozenset({"timesteps"}),
    ),
    Sampler(
        name="PNDMScheduler",
        options={
            **BETAS,
            **_SPACED,
            "skip_prk_steps": False,
            "set_alpha_to_one": False,
        },
        compile=_pndm,
    ),
    Sampler(name="LCMScheduler", options=_CONSISTENCY, compile=_lcm, takes=frozenset({"timesteps"})),
    Sampler(name="TCDScheduler", options=_CONSISTENCY, compile=_tcd, takes=frozenset({"timesteps", "eta"})),
)
