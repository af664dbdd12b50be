"""The noise levels that diffusers' schedulers go along, for a sampler that takes nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.samplers.names import find_sampler

DDIM, EULER = "DDIMScheduler", "EulerDiscreteScheduler"


def require_sampler(name: str) -> None:
    """Refuses what Euler's method along noise levels does not draw.

    Raises:
        ControlRTError: neither DDIM nor Euler, whose schedule may be any.
    """
    if find_sampler(name)[0].name not in (DDIM, EULER):
        raise ControlRTError(
            f"stable-diffusion.cpp draws what diffusers draws with DDIM and Euler, not with {name}; use --sampler DDIM"
        )


def noise_levels(config: Mapping[str, Any], sampler: str, steps: int) -> list[float]:
    """The ``steps + 1`` sigmas of diffusers' scheduler, in the coordinates of Karras et al. 2022, arXiv 2206.00364.

    In these, where latents are the picture plus sigma times the noise, DDIM is Euler's method (Song et al. 2021,
    arXiv 2010.02502, eq. 14).

    Args:
        config: of the checkpoint's scheduler.
        sampler: see ``require_sampler``.
        steps: denoising steps.
    """
    import diffusers

    found, options = find_sampler(sampler)
    scheduler = getattr(diffusers, found.name).from_config(dict(config), **options)
    scheduler.set_timesteps(steps)
    if found.name == EULER:
        return [float(sigma) for sigma in scheduler.sigmas]
    signals = [float(scheduler.alphas_cumprod[timestep]) for timestep in scheduler.timesteps]
    return [((1 - signal) / signal) ** 0.5 for signal in (*signals, float(scheduler.final_alpha_cumprod))]
