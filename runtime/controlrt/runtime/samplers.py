"""Samplers as coefficient tables: one row per step, applied by one linear update inside the compiled step.

With x_t the latents and m the guided model output, every step is

    x_{t-1} = a * x_t + b * m,        the model seeing s * x_t at timestep t

and a row holds (t, s, a, b). The prediction type is folded in: with signal rate alpha and noise rate sigma,
x_t = alpha x_0 + sigma eps, a model that predicts epsilon, x_0 ("sample") or v = alpha eps - sigma x_0 gives x_0 and
eps as linear functions of (x_t, m). Tables are computed in float64 from the checkpoint's scheduler config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError

Config = Mapping[str, Any]
MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class SamplerTable:
    """The rows of one sampling run of n steps."""

    timesteps: NDArray[np.float64]
    """(n,): what the model is told, descending."""
    input_scale: NDArray[np.float64]
    """(n,): the model sees latents * input_scale."""
    coefficients: NDArray[np.float64]
    """(n, 2): next latents = c[0] * latents + c[1] * model output."""
    initial_scale: float
    """The starting noise is standard normal times this."""

    def __len__(self) -> int:
        return len(self.timesteps)


def compile_sampler(name: str, config: Config, num_inference_steps: int) -> SamplerTable:
    """The table of sampler ``name`` (a diffusers class name or alias) for a diffusers scheduler config.

    Raises:
        UnknownNameError: no such sampler.
        ParameterError: steps outside 1..1000.
        UserError: the config asks for something this sampler cannot do linearly.
    """
    compile_table = SAMPLERS.get(ALIASES.get(name.lower(), name))
    if compile_table is None:
        raise UnknownNameError("sampler", name, [*SAMPLERS, *ALIASES], "choose one with scheduler= or --scheduler")
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, (int, np.integer)):
        raise ParameterError("num_inference_steps", num_inference_steps, "a whole number")
    train_steps = int(config.get("num_train_timesteps", 1000))
    if not 1 <= num_inference_steps <= min(train_steps, MAX_STEPS):
        raise ParameterError("num_inference_steps", num_inference_steps, f"from 1 to {min(train_steps, MAX_STEPS)}")
    return compile_table(config, int(num_inference_steps))


def alphas_cumprod(config: Config) -> NDArray[np.float64]:
    """Product of (1 - beta) up to each training timestep: (num_train_timesteps,). DDPM, Ho et al. 2020, eq. 4."""
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif schedule == "linear":
        betas = np.linspace(start, end, steps)
    elif schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise UnknownNameError("beta_schedule", schedule, ["linear", "scaled_linear", "squaredcos_cap_v2"])
    product = np.cumprod(1 - betas).astype(np.float64)
    if config.get("rescale_betas_zero_snr", False):  # Lin et al. 2023, arXiv 2305.08891, algorithm 1
        root = np.sqrt(product)
        product = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return product


def _refuse(config: Config, name: str, options: Mapping[str, Any]) -> None:
    for option, neutral in options.items():
        if config.get(option, neutral) != neutral:
            raise UserError(
                f"sampler {name} does not support {option}={config[option]!r} of the checkpoint's scheduler config "
                f"yet; supported: {option}={neutral!r}"
            )


def _spaced(config: Config, steps: int, default: str) -> NDArray[np.float64]:
    """Timesteps of Lin et al. 2023, table 2, as diffusers rounds them: descending, before any interpolation."""
    train_steps = int(config.get("num_train_timesteps", 1000))
    spacing = config.get("timestep_spacing", default)
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps)[::-1].copy()
    if spacing == "leading":
        stride = train_steps // steps
        return (np.arange(steps) * stride)[::-1].astype(np.float64) + int(config.get("steps_offset", 0))
    if spacing == "trailing":
        return np.round(np.arange(train_steps, 0, -train_steps / steps))[:steps] - 1
    raise UnknownNameError("timestep_spacing", str(spacing), ["leading", "linspace", "trailing"])


def _split(config: Config, alpha: NDArray[np.float64], sigma: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Coefficients (x_0 of x_t, x_0 of m, eps of x_t, eps of m), each (n,), for x_t = alpha x_0 + sigma eps."""
    zeros, ones = np.zeros_like(alpha), np.ones_like(alpha)
    prediction = config.get("prediction_type", "epsilon")
    if prediction == "epsilon":
        if alpha.min() < 1e-6:
            raise UserError(
                "the model predicts epsilon, and this schedule starts without any signal (rescale_betas_zero_snr), "
                "where epsilon tells nothing; use timestep_spacing leading, or rescale_betas_zero_snr False"
            )
        return 1 / alpha, -sigma / alpha, zeros, ones
    if prediction == "sample":
        return zeros, ones, 1 / sigma, -alpha / sigma
    if prediction == "v_prediction":  # Salimans & Ho 2022, appendix D; alpha^2 + sigma^2 = 1
        return alpha, -sigma, sigma, alpha
    raise UnknownNameError("prediction_type", str(prediction), ["epsilon", "sample", "v_prediction"])


def _ddim(config: Config, steps: int) -> SamplerTable:
    """DDIM with eta 0 (Song et al. 2021, arXiv 2010.02502, eq. 12)."""
    _refuse(config, "DDIMScheduler", {"thresholding": False})
    if config.get("clip_sample", True):
        raise UserError(
            "sampler DDIMScheduler does not support clip_sample=True yet, which is its default; Stable Diffusion uses "
            "False: set it in the bundle's checkpoint (scheduler_config.json) and build again, or use another sampler"
        )
    product = alphas_cumprod(config)
    timesteps = np.round(_spaced(config, steps, "leading"))
    if timesteps[0] > len(product) - 1:
        raise ParameterError(
            "num_inference_steps", steps, f"such that step {timesteps[0]:.0f} (steps_offset included) is trained"
        )
    previous = timesteps - len(product) // steps
    final = 1.0 if config.get("set_alpha_to_one", True) else product[0]
    now = product[timesteps.astype(int)]
    then = np.where(previous >= 0, product[np.maximum(previous, 0).astype(int)], final)
    x0_x, x0_m, eps_x, eps_m = _split(config, np.sqrt(now), np.sqrt(1 - now))
    coefficients = np.stack(
        [np.sqrt(then) * x0_x + np.sqrt(1 - then) * eps_x, np.sqrt(then) * x0_m + np.sqrt(1 - then) * eps_m], axis=1
    )
    return SamplerTable(timesteps=timesteps, input_scale=np.ones(steps), coefficients=coefficients, initial_scale=1.0)


def _euler(config: Config, steps: int) -> SamplerTable:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn)."""
    _refuse(
        config,
        "EulerDiscreteScheduler",
        {
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
            "sigma_min": None,
            "sigma_max": None,
        },
    )
    product = alphas_cumprod(config)
    if config.get("rescale_betas_zero_snr", False):
        product[-1] = 2.0**-24  # keeps the first sigma finite, as diffusers does
    all_sigmas = np.sqrt((1 - product) / product)
    timesteps = _spaced(config, steps, "linspace")
    sigmas = np.interp(timesteps, np.arange(len(all_sigmas)), all_sigmas)
    scale = 1 / np.sqrt(sigmas**2 + 1)
    # in the scaled latents s x_t = alpha x_0 + sqrt(1 - alpha^2) eps, so x_0 = x0_x (s x_t) + x0_m m
    x0_x, x0_m, _, _ = _split(config, scale, sigmas * scale)
    jump = (np.append(sigmas[1:], 0.0) - sigmas) / sigmas  # x + (sigma' - sigma) (x - x_0) / sigma
    coefficients = np.stack([1 + jump * (1 - x0_x * scale), -jump * x0_m], axis=1)
    if config.get("prediction_type", "epsilon") == "epsilon":  # exact: x_0 = x - sigma m
        coefficients = np.stack([np.ones(steps), jump * sigmas], axis=1)
    spread = config.get("timestep_spacing", "linspace") in ("linspace", "trailing")
    initial_scale = sigmas.max() if spread else np.sqrt(sigmas.max() ** 2 + 1)
    return SamplerTable(
        timesteps=timesteps, input_scale=scale, coefficients=coefficients, initial_scale=float(initial_scale)
    )


SAMPLERS: dict[str, Callable[[Config, int], SamplerTable]] = {
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
}
"""Samplers by diffusers class name."""

ALIASES = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}
"""The names people use, in lower case."""
