"""The sampler compiler: scheduler config and step count to a table of rows that one linear update applies.

``docs/samplers.md`` explains the table with its equations. Tables are computed in float64 from the checkpoint's
scheduler config; no sampler-specific code runs in the loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controlrt.runtime.errors import ParameterError, UnknownNameError, about
from controlrt.runtime.samplers.names import ALIASES, SAMPLERS, SUFFIXES, find_sampler, known_names
from controlrt.runtime.samplers.sampler import Request, Sampler, prediction, resolve_options
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
    name = config.get("_class_name") if name is None else name
    if name is None:
        raise ParameterError("scheduler", None, "named, since the scheduler config has no _class_name")
    with about("scheduler"):
        sampler, implied = find_sampler(name)
    for option in options:
        if option not in sampler.options:
            raise UnknownNameError(f"option of {sampler.name}", str(option), sampler.options)
    resolved = resolve_options(sampler, {**config, **implied, **options})

    custom_timesteps, custom_sigmas = (
        _descending("timesteps", timesteps, sampler),
        _descending("sigmas", sigmas, sampler),
    )
    steps = _steps(num_inference_steps, custom_timesteps, custom_sigmas, int(resolved["num_train_timesteps"]))
    if (
        custom_timesteps is not None
        and not 0 <= custom_timesteps[-1] <= custom_timesteps[0] < resolved["num_train_timesteps"]
    ):
        raise ParameterError("timesteps", custom_timesteps.tolist(), f"from 0 to {resolved['num_train_timesteps'] - 1}")
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
    with np.errstate(all="ignore"):  # the log of a final sigma of zero, rows that are never run
        compiled = sampler.compile(request)
        predicted = prediction(resolved["prediction_type"], compiled)
    if request.begin >= len(compiled.timesteps):
        raise ParameterError("strength", strength, f"more: {steps} steps of {sampler.name} leave none to run")
    table = assemble(compiled, request.begin, strength is not None, predicted)
    if not (np.isfinite(table.update).all() and np.isfinite(table.clip).all()):
        if resolved.get("rescale_betas_zero_snr") and resolved["prediction_type"] == "epsilon":
            raise request.refuse(
                "the model predicts epsilon, which tells nothing at a first step without any signal "
                "(rescale_betas_zero_snr)",
                "set rescale_betas_zero_snr False",
            )
        raise request.refuse(
            f"these options give no finite coefficients at {steps} steps (two equal sigmas, most likely)",
            "use fewer steps or another schedule",
        )
    return table


def _steps(steps: int | None, timesteps: Array | None, sigmas: Array | None, train_steps: int) -> int:
    if timesteps is not None and sigmas is not None:
        raise ParameterError("sigmas", sigmas.tolist(), "left out where timesteps are given")
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
        raise ParameterError(kind, values, f"left out for {sampler.name}; these take them: {_takers(kind)}")
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ParameterError(kind, values, "a list of numbers") from None
    shortest = 1 if kind == "timesteps" else 2
    if array.ndim != 1 or len(array) < shortest or not np.isfinite(array).all():
        raise ParameterError(kind, values, f"a list of at least {shortest} finite numbers")
    if (np.diff(array) >= 0).any():
        raise ParameterError(kind, array.tolist(), "descending, each less than the one before")
    if kind == "timesteps" and (array != np.round(array)).any():
        raise ParameterError(kind, array.tolist(), "whole numbers")
    if kind == "sigmas" and (array[-1] < 0 or array[-2] <= 0):
        raise ParameterError(kind, array.tolist(), "positive, but for a final zero")
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
