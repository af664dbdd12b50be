"""Noise schedules and step grids: betas, timestep spacings, and the sigma schedules people choose by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError
from controlrt.runtime.samplers.table import Array

Config = Mapping[str, Any]

SPACINGS = ("leading", "linspace", "trailing")
SIGMA_SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid")
_ALMOST_ZERO_ALPHA = 2.0**-24
"""Keeps the first sigma finite under zero terminal SNR, the value diffusers chose."""


class NoiseSchedule:
    """The training schedule of a checkpoint: how much signal is left at each timestep."""

    def __init__(self, config: Config, *, finite: bool = False) -> None:
        """``finite`` keeps the last alpha above zero where the schedule ends without signal."""
        self._config, self._finite = config, finite and bool(config.get("rescale_betas_zero_snr", False))
        self.alphas_cumprod = alphas_cumprod(config)
        if self._finite:
            self.alphas_cumprod[-1] = _ALMOST_ZERO_ALPHA

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Array:
        """Noise over signal at each timestep, ascending: (num_train_timesteps,)."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    @cached_property
    def log_sigmas(self) -> Array:
        """Logarithm of ``sigmas``."""
        return np.log(self.sigmas)

    @cached_property
    def single_sigmas(self) -> NDArray[np.float32]:
        """``sigmas`` as diffusers' float32 arithmetic gives them, bit for bit."""
        product = _single_alphas_cumprod(self._config)
        if self._finite:
            product[-1] = _ALMOST_ZERO_ALPHA
        with np.errstate(divide="ignore"):
            sigmas: NDArray[np.float32] = np.sqrt((np.float32(1) - product) / product)
        return sigmas

    def sigma_at(self, timesteps: Array) -> Array:
        """Sigma at fractional timesteps, linear in between."""
        return np.interp(timesteps, np.arange(len(self)), self.sigmas)

    def timestep_of(self, sigmas: Array) -> Array:
        """Fractional timestep of each sigma, linear in log sigma (k-diffusion's ``sigma_to_t``)."""
        return _timestep_of(sigmas, self.log_sigmas)

    def cut_timestep_of(self, sigmas: Array) -> Array:
        """Whole timestep below each sigma, cut where diffusers cuts it: its float32 decides at whole numbers."""
        return np.floor(_timestep_of(sigmas, np.log(self.single_sigmas).astype(np.float64)))


def _timestep_of(sigmas: Array, log_sigmas: Array) -> Array:
    wanted = np.log(np.maximum(sigmas, 1e-10))
    # all but the last sigma ascend; the last one does not where it was kept finite
    low = np.clip(np.searchsorted(log_sigmas[:-1], wanted, side="right") - 1, 0, len(log_sigmas) - 2)
    low = np.where(wanted >= log_sigmas[-1], len(log_sigmas) - 2, low)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    weight = np.clip((below - wanted) / (below - above), 0, 1)
    timesteps: Array = (1 - weight) * low + weight * (low + 1)
    return timesteps


def alphas_cumprod(config: Config) -> Array:
    """Product of (1 - beta) up to each training timestep: (num_train_timesteps,). DDPM, Ho et al. 2020, eq. 4."""
    product = np.cumprod(1 - _betas(config)).astype(np.float64)
    if config.get("rescale_betas_zero_snr", False):  # Lin et al. 2023, arXiv 2305.08891, algorithm 1
        root = np.sqrt(product)
        product = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return product


def _single_alphas_cumprod(config: Config) -> NDArray[np.float32]:
    """``alphas_cumprod`` in float32 as PyTorch computes it: linspace from both ends, products summed up in float64."""
    single, schedule = np.float32, config["beta_schedule"]
    betas = _betas(config).astype(single)
    if config.get("trained_betas") is None and schedule in ("linear", "scaled_linear"):
        power = 0.5 if schedule == "scaled_linear" else 1.0
        start, end = single(config["beta_start"] ** power), single(config["beta_end"] ** power)
        steps = int(config["num_train_timesteps"])
        index, stride = np.arange(steps), np.float64((end - start) / single(steps - 1))
        rising = np.float64(start) + stride * index
        betas = np.where(index < steps // 2, rising, np.float64(end) - stride * (steps - 1 - index)).astype(single)
        betas = betas * betas if schedule == "scaled_linear" else betas

    def product(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.cumprod(alphas.astype(np.float64)).astype(single)

    result = product(single(1) - betas)
    if config.get("rescale_betas_zero_snr", False):
        root = np.sqrt(result)
        bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        with np.errstate(invalid="ignore"):
            alphas = np.append(bar[:1], bar[1:] / bar[:-1])
        result = product(single(1) - (single(1) - alphas))
    return result


def _betas(config: Config) -> Array:
    steps, schedule = int(config["num_train_timesteps"]), config["beta_schedule"]
    if config.get("trained_betas") is not None:
        trained = np.asarray(config["trained_betas"], np.float64)
        if trained.shape != (steps,):
            raise ParameterError("trained_betas", f"of shape {trained.shape}", f"num_train_timesteps ({steps}) numbers")
        return trained
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if schedule == "linear":
        return np.linspace(start, end, steps)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if schedule == "sigmoid":  # Xu et al. 2022 (GeoDiff)
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    t = np.arange(steps + 1) / steps
    if schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    elif schedule == "exp":
        bar = np.exp(-12 * t)
    elif schedule == "laplace":  # Hang et al. 2024, arXiv 2407.03297
        snr = np.exp(-0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6))
        bar = np.sqrt(snr / (1 + snr))
    else:
        raise UnknownNameError("beta_schedule", str(schedule), BETA_SCHEDULES)
    betas: Array = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    return betas


def spaced(config: Config, steps: int) -> Array:
    """Descending timesteps as the spacing says (Lin et al. 2023, table 2), before rounding: (steps,)."""
    train_steps, spacing = int(config["num_train_timesteps"]), config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * float(train_steps // steps) + int(config["steps_offset"])
    if spacing == "trailing":
        return np.round(np.arange(train_steps, 0, -train_steps / steps))[:steps] - 1
    raise UnknownNameError("timestep_spacing", str(spacing), SPACINGS)


def spaced_above_zero(config: Config, steps: int, last: int) -> Array:
    """Whole descending timesteps of the solvers in lambda, which leave the end of the grid out: (steps,).

    ``last`` is the number of timesteps used, fewer than trained ones where lambda is clipped.
    """
    spacing = config["timestep_spacing"]
    if last < 2:
        raise ParameterError("lambda_min_clipped", config["lambda_min_clipped"], "such that timesteps are left")
    if spacing == "linspace":
        return np.round(np.linspace(0, last - 1, steps + 1))[:0:-1]
    if spacing == "leading":
        if last <= steps:
            raise ParameterError(
                "num_inference_steps",
                steps,
                f"less than {last} with timestep_spacing leading; or use trailing",
            )
        return np.arange(1, steps + 1, dtype=np.float64)[::-1] * float(last // (steps + 1)) + int(
            config["steps_offset"]
        )
    if spacing == "trailing":
        return np.round(np.arange(last, 0, -int(config["num_train_timesteps"]) / steps))[:steps] - 1
    raise UnknownNameError("timestep_spacing", str(spacing), SPACINGS)


def sigma_schedule(config: Config) -> str | None:
    """Which of ``SIGMA_SCHEDULES`` the config asks for.

    Raises:
        UserError: more than one.
    """
    asked = [name for name in SIGMA_SCHEDULES if config.get(name)]
    if len(asked) > 1:
        raise UserError(f"the scheduler config sets {' and '.join(asked)}; set one of them")
    return asked[0] if asked else None


def spread_sigmas(schedule: str, config: Config, low: float, high: float, steps: int, *, bounded: bool = True) -> Array:
    """Descending sigmas from ``high`` to ``low`` by one of ``SIGMA_SCHEDULES``: (steps,).

    With ``bounded`` the config's ``sigma_min`` and ``sigma_max`` come first.
    """
    ramp = np.linspace(0, 1, steps)
    if bounded:
        low = low if config["sigma_min"] is None else float(config["sigma_min"])
        high = high if config["sigma_max"] is None else float(config["sigma_max"])
    if not low <= high:
        raise ParameterError("sigma_min", float(low), f"at most sigma_max ({high:g})")
    if schedule == "use_karras_sigmas":
        return karras_sigmas(ramp, low, high)
    if schedule == "use_beta_sigmas":  # Lee et al. 2024, arXiv 2407.12173
        return low + beta_quantile(1 - ramp, 0.6) * (high - low)
    # Lu et al. 2022 space lambda = -log sigma evenly, which is the exponential schedule
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def karras_sigmas(ramp: Array, low: float, high: float, rho: float = 7.0) -> Array:
    """Karras et al. 2022, arXiv 2206.00364, eq. 5."""
    sigmas: Array = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return sigmas


def beta_quantile(probability: NDArray[np.float64], shape: float) -> Array:
    """Quantiles of the symmetric beta distribution Beta(shape, shape), to about 1e-14.

    Below the median the distribution function is x^shape times a power series in x (DLMF 8.17.7); Newton's method in
    x^shape, in which it is almost straight, converges in a few rounds.
    """
    lower = np.minimum(probability, 1 - probability)
    order = np.arange(60)
    # (1 - shape)_k / k!, divided by shape + k: the series of the incomplete beta function
    series = np.cumprod(np.concatenate([[1.0], (order[:-1] + 1 - shape) / (order[:-1] + 1)])) / (shape + order)
    complete = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    target = lower * complete
    y = target * shape  # y = x^shape
    for _ in range(8):
        x = np.minimum(y, 0.5**shape) ** (1 / shape)
        value = y * np.polynomial.polynomial.polyval(x, series)
        slope = (1 - x) ** (shape - 1) / shape  # d value / d y
        before, y = y, np.clip(y - (value - target) / slope, 0, 0.5**shape)
        if np.abs(y - before).max(initial=0.0) < 1e-15:
            break
    x = y ** (1 / shape)
    return np.where(probability <= 0.5, x, 1 - x)
