"""The names people call samplers by: diffusers class names, and the familiar ones with a schedule's name behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlrt.runtime.errors import UnknownNameError
from controlrt.runtime.samplers import diffusion, exponential, kdiffusion
from controlrt.runtime.samplers.sampler import Sampler
from controlrt.runtime.samplers.schedule import SIGMA_SCHEDULES

SAMPLERS: Mapping[str, Sampler] = {
    sampler.name: sampler for sampler in (*diffusion.SAMPLERS, *kdiffusion.SAMPLERS, *exponential.SAMPLERS)
}
"""Samplers by diffusers class name."""

_MULTISTEP = "DPMSolverMultistepScheduler"
ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "DPM++ 2M": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "DPM++ 2M SDE": (_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "DPM++ 2M SDE Heun": (
        _MULTISTEP,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "heun"},
    ),
    "DPM++ 3M": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "DPM++ 3M SDE": (_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "EDM Euler": ("EDMEulerScheduler", {}),
    "EDM DPM++ 2M": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
"""Familiar names: the class and the options that make it what is meant."""

SUFFIXES: Mapping[str, Mapping[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Beta": {"use_beta_sigmas": True},
    "Lu": {"use_lu_lambdas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
}
"""Schedules that may follow a familiar name, as in "DPM++ 2M Karras"; each where the sampler has the option."""


def known_names() -> list[str]:
    """Every name that ``find_sampler`` takes: familiar ones, those with a schedule, class names."""
    names = []
    for alias, (cls, _) in ALIASES.items():
        names.append(alias)
        names += [f"{alias} {suffix}" for suffix in SUFFIXES if _fits(SAMPLERS[cls], suffix)]
    return [*names, *SAMPLERS]


def find_sampler(name: str) -> tuple[Sampler, Mapping[str, Any]]:
    """The sampler called ``name``, in any case, and the options that the name implies.

    Raises:
        UnknownNameError: no such sampler, or none with such a schedule; lists the familiar names and the nearest of
            all.
    """
    by_class = {cls.lower(): sampler for cls, sampler in SAMPLERS.items()}
    wanted = " ".join(str(name).split()).lower()
    if wanted in by_class:
        return by_class[wanted], {}
    for alias, (cls, options) in ALIASES.items():
        if wanted == alias.lower():
            return SAMPLERS[cls], options
        for suffix, schedule in SUFFIXES.items():
            if wanted == f"{alias} {suffix}".lower() and _fits(SAMPLERS[cls], suffix):
                return SAMPLERS[cls], {**options, **dict.fromkeys(SIGMA_SCHEDULES, False), **schedule}
            if wanted == f"{alias} {suffix}".lower():
                others = [other for other in SUFFIXES if _fits(SAMPLERS[cls], other)]
                raise UnknownNameError(f"schedule of {alias}", suffix, others, "leave it out for the sampler's own")
    raise UnknownNameError(
        "sampler",
        str(name),
        known_names(),
        f"some may be followed by {', '.join(SUFFIXES)}",
        show=[*ALIASES, *SAMPLERS],
    )


def _fits(sampler: Sampler, suffix: str) -> bool:
    return all(option in sampler.options for option in SUFFIXES[suffix])
