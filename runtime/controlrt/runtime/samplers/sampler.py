"""What a sampler is: a diffusers class name, its options with their defaults, and a function from request to steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError
from controlrt.runtime.samplers.table import LATENTS, OUTPUT, Array, Form, Steps

BETAS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
"""The options that every noise schedule has, with the defaults of most classes."""

SPREAD: Mapping[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
"""The options of samplers whose sigmas can be spread by name."""

NO_THRESHOLD: Mapping[str, Any] = {"thresholding": False}
NO_FLOW: Mapping[str, Any] = {"use_flow_sigmas": False}
REFUSED = ("thresholding", "use_flow_sigmas", "solver_p")
"""Options that are not linear, or not of Stable Diffusion: a sampler that has one takes only its default."""

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
"""The variances of DDPM that the schedule fixes."""
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One table to compile. ``config`` holds exactly the sampler's own options."""

    sampler: str
    config: Mapping[str, Any]
    steps: int
    timesteps: Array | None = None
    """Custom timesteps, descending."""
    sigmas: Array | None = None
    """Custom sigmas, descending, the final one included."""
    eta: float = 0.0
    begin: int = 0
    """The first model call that is made; later than 0 for picture to picture."""

    def refuse(self, problem: str, mend: str) -> UserError:
        """An error that names this sampler."""
        return UserError(f"sampler {self.sampler}: {problem}; {mend}")

    def age(self, calls: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """How many calls were made before each one: (calls,); negative before ``begin``."""
        return np.arange(calls) - self.begin


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One diffusers scheduler class."""

    name: str
    options: Mapping[str, Any]
    """Its options and their defaults; any other key of a config is another sampler's and has no effect."""
    compile: Callable[[Request], Steps]
    takes: frozenset[str] = frozenset()
    """Which of timesteps, sigmas and eta a call may give."""
    order: int = 1
    """Model calls per step, the last one excepted."""


def predict(prediction_type: str, alpha: Array | float, sigma: Array | float) -> tuple[Form, Form]:
    """The picture x_0 and the noise eps that a model output stands for, where latents = alpha x_0 + sigma eps.

    Variance-preserving: alpha^2 + sigma^2 = 1. v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512).
    """
    if prediction_type == "epsilon":
        return (LATENTS - sigma * OUTPUT) / alpha, OUTPUT
    if prediction_type == "sample":
        return OUTPUT, (LATENTS - alpha * OUTPUT) / sigma
    if prediction_type == "v_prediction":
        return alpha * LATENTS - sigma * OUTPUT, alpha * OUTPUT + sigma * LATENTS
    raise UnknownNameError("prediction_type", str(prediction_type), PREDICTIONS)


def predict_at(prediction_type: str, sigma: Array) -> tuple[Form, Array]:
    """x_0 where latents = x_0 + sigma eps, and the scale at which the model sees such latents."""
    scale = 1 / np.sqrt(sigma**2 + 1)
    if prediction_type == "epsilon":
        return LATENTS - sigma * OUTPUT, scale
    if prediction_type == "sample":
        return OUTPUT, scale
    if prediction_type == "v_prediction":
        return scale**2 * LATENTS - sigma * scale * OUTPUT, scale
    raise UnknownNameError("prediction_type", str(prediction_type), PREDICTIONS)


def prediction(prediction_type: str, steps: Steps) -> Form:
    """x_0 at every call of the model, whatever the sampler makes of it."""
    scale = 1 / np.hypot(*steps.start)
    alpha, sigma = (scale * each for each in steps.start)
    x_0, _ = predict(prediction_type, alpha, sigma)
    return Form({"latents": x_0.terms.get("latents", 0.0) * scale, "output": x_0.terms["output"]})


_POSITIVE = ("sigma_min", "sigma_max", "sigma_data", "rho", "timestep_scaling", "clip_sample_range")


def resolve_options(sampler: Sampler, given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler's own options out of a config, checked; what is absent or null has its default.

    Raises:
        ParameterError: a value of another kind than the default, or one that cannot be.
    """
    resolved = {}
    for option, default in sampler.options.items():
        value = given.get(option)
        resolved[option] = default if value is None else value
        allowed = None if value is None else _problem(option, value, default)
        if allowed:
            raise ParameterError(f"{option} of the scheduler config", value, f"{allowed} for {sampler.name}")
    if resolved.get("original_inference_steps", 1) > resolved["num_train_timesteps"]:
        most = f"at most num_train_timesteps ({resolved['num_train_timesteps']})"
        raise ParameterError("original_inference_steps", resolved["original_inference_steps"], most)
    return resolved


def _problem(option: str, value: Any, default: Any) -> str | None:
    """What ``value`` should be instead; None where it may be."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if option in REFUSED:
        return f"{default}" if value != default else None
    if isinstance(default, bool):
        return "True or False" if not isinstance(value, bool) else None
    if option in ("num_train_timesteps", "original_inference_steps"):
        return "a whole number from 2 to 100000" if not (isinstance(value, int) and 2 <= value <= 100_000) else None
    if option == "steps_offset":
        return "a whole number of at least 0" if not (number and isinstance(value, int) and value >= 0) else None
    if option == "solver_order":
        return "1, 2 or 3" if not (number and isinstance(value, int) and value in (1, 2, 3)) else None
    if option in _POSITIVE:
        return "a number above 0" if not (number and 0 < value < np.inf) else None
    if option in ("beta_start", "beta_end"):
        return "a number between 0 and 1" if not (number and 0 < value < 1) else None
    if option == "lambda_min_clipped":
        return "a number" if not number else None
    if option == "variance_type":
        return "fixed_small, fixed_small_log or fixed_large" if value not in VARIANCES else None
    if option == "disable_corrector":
        whole = isinstance(value, (list, tuple)) and all(isinstance(one, int) for one in value)
        return "a list of steps" if not whole else None
    if option == "trained_betas":
        listed = isinstance(value, (list, tuple, np.ndarray)) and len(value) > 1
        return "a list of numbers" if not listed else None
    return "a name" if not isinstance(value, str) else None
