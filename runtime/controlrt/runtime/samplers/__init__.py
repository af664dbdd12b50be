"""The sampler compiler: scheduler config and step count to a table of rows that one linear update applies.

``docs/samplers.md`` explains the table with its equations. Tables are computed in float64 from the checkpoint's
scheduler config; no sampler-specific code runs in the loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controlrt.runtime.errors import ParameterError, UnknownNameError
from controlrt.runtime.samplers.names import ALIASES, SAMPLERS, SUFFIXES, find_sampler, known_names
from controlrt.runtime.samplers.sampler import REFUSED, Request, Sampler
from controlrt.runtime.samplers.table import COLUMNS, HISTORY, Array, SamplerTable, assemble

__all__ = ["ALIASES", "COLUMNS", "HISTORY", "SAMPLERS", "SUFFIXES", "SamplerTable", "compile_sampler", "known_names"]

MAX_STEPS = 1000

SchedulerChoice = str | Mapping[str, Any]
"""A sampler's name, or options over those of the checkpoint, with ``_class_name`` to switch the sampler too."""


def compile_sampler(
    scheduler: SchedulerChoice | None,
    config: Mapping[str, Any],
    num_inference_steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
    strength: float | None = None,
) -> SamplerTable:
    """The table of a sampler for a checkpoint's diffusers scheduler config.

    Options that the config does not give have the defaults of the sampler's diffusers class, and options of other
    classes have no effect, as with ``from_config``.

    Args:
        scheduler: a name (see ``known_names``), a mapping of options, or None for the config's own ``_class_name``.
        config: the checkpoint's scheduler config.
        num_inference_steps: 1 to 1000; left out where timesteps or sigmas are given.
        timesteps: custom timesteps, descending, for samplers that take them.
        sigmas: custom sigmas, descending and ending in the final one, for samplers that take them.
        eta: how much noise DDIM and TCD add, 0 to 1.
        strength: picture to picture: the fraction of the steps that is run, from a noised picture.

    Raises:
        UnknownNameError: no such sampler, or no such value of an option.
        ParameterError: a value outside its range.
        UserError: something that this sampler cannot do; nothing is ever silently different.
    """
    options = dict(scheduler) if isinstance(scheduler, Mapping) else {}
    name = options.pop("_class_name", None) if isinstance(scheduler, Mapping) else scheduler
    sampler, implied = find_sampler(config["_class_name"] if name is None else name)
    for option in options:
        if option not in sampler.options:
            raise UnknownNameError(f"option of {sampler.name}", option, sampler.options)
    given = {**config, **implied, **options}
    for option, neutral in REFUSED.items():
        if given.get(option, neutral) not in (neutral, None):
            raise ParameterError(f"{option} of the scheduler config", given[option], f"{neutral} for {sampler.name}")
    resolved = {option: given.get(option, default) for option, default in sampler.options.items()}
    if resolved.get("variance_type") in ("learned", "learned_range"):
        raise ParameterError("variance_type of the scheduler config", resolved["variance_type"], "a fixed one")

    custom_timesteps, custom_sigmas = (
        _descending("timesteps", timesteps, sampler),
        _descending("sigmas", sigmas, sampler),
    )
    steps = _steps(num_inference_steps, custom_timesteps, custom_sigmas, int(resolved["num_train_timesteps"]))
    if (
        custom_timesteps is not None
        and not 0 <= custom_timesteps[-1] <= custom_timesteps[0] < resolved["num_train_timesteps"]
    ):
        raise ParameterError("timesteps", list(custom_timesteps), f"from 0 to {resolved['num_train_timesteps'] - 1}")
    request = Request(
        sampler=sampler.name,
        config=resolved,
        steps=steps,
        timesteps=custom_timesteps,
        sigmas=custom_sigmas,
        eta=_fraction("eta", eta),
        begin=_begin(strength, steps) * sampler.order,
    )
    if request.eta and "eta" not in sampler.takes:
        raise request.refuse("takes no eta", f"leave it out, or use {_takers('eta')}")
    with np.errstate(divide="ignore"):  # log of a final sigma of zero
        compiled = sampler.compile(request)
    table = assemble(compiled, request.begin, strength is not None)
    if not np.isfinite(table.update).all():
        raise request.refuse(
            f"these options give no finite coefficients at {steps} steps (two equal sigmas, most likely)",
            "use fewer steps or another schedule",
        )
    return table


def _steps(steps: int | None, timesteps: Array | None, sigmas: Array | None, train_steps: int) -> int:
    if timesteps is not None and sigmas is not None:
        raise ParameterError("sigmas", list(sigmas), "left out where timesteps are given")
    if timesteps is not None or sigmas is not None:
        implied = len(timesteps) if timesteps is not None else len(sigmas) - 1  # type: ignore[arg-type]
        if steps not in (None, implied):
            raise ParameterError(
                "num_inference_steps", steps, f"left out, or {implied} as the timesteps or sigmas imply"
            )
        return implied
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise ParameterError("num_inference_steps", steps, "a whole number")
    if not 1 <= steps <= min(train_steps, MAX_STEPS):
        raise ParameterError("num_inference_steps", steps, f"from 1 to {min(train_steps, MAX_STEPS)}")
    return int(steps)


def _descending(kind: str, values: Sequence[float] | None, sampler: Sampler) -> Array | None:
    """Custom timesteps or sigmas, checked."""
    if values is None:
        return None
    if kind not in sampler.takes:
        raise ParameterError(kind, list(values), f"left out for {sampler.name}; these take them: {_takers(kind)}")
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ParameterError(kind, values, "a list of numbers") from None
    shortest = 1 if kind == "timesteps" else 2
    if array.ndim != 1 or len(array) < shortest or not np.isfinite(array).all():
        raise ParameterError(kind, values, f"a list of at least {shortest} finite numbers")
    if (np.diff(array) >= 0).any():
        raise ParameterError(kind, list(values), "descending, each less than the one before")
    if kind == "timesteps" and (array != np.round(array)).any():
        raise ParameterError(kind, list(values), "whole numbers")
    if kind == "sigmas" and (array[-1] < 0 or array[-2] <= 0):
        raise ParameterError(kind, list(values), "positive, but for a final zero")
    return array


def _fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise ParameterError(name, value, "a number from 0 to 1")
    return float(value)


def _begin(strength: float | None, steps: int) -> int:
    """The first step that picture to picture runs, by diffusers' rounding rule."""
    if strength is None:
        return 0
    run = min(int(steps * _fraction("strength", strength)), steps)
    if run < 1:
        raise ParameterError(
            "strength", strength, f"at least {math.ceil(1000 / steps) / 1000:g}, for one of {steps} steps"
        )
    return steps - run


def _takers(kind: str) -> str:
    return ", ".join(name for name, sampler in SAMPLERS.items() if kind in sampler.takes)
