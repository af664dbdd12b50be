"""What a sampler is: a diffusers class name, its options with their defaults, and a function from request to steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from controlrt.runtime.errors import UnknownNameError, UserError
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

REFUSED: Mapping[str, Any] = {
    "thresholding": False,
    "use_flow_sigmas": False,
    "solver_p": None,
}
"""Options of any sampler that are not linear, or not of Stable Diffusion, and the only value they may have."""

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
        if np.min(alpha) < 1e-6:
            raise UserError(
                "the model predicts epsilon, and this schedule starts without any signal (rescale_betas_zero_snr), "
                "where epsilon tells nothing; use timestep_spacing leading, or rescale_betas_zero_snr False"
            )
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
