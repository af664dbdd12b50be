"""The web UI's samplers and schedules, in our scheduler options; its rules for which steps picture to picture runs.

The web UI starts from k-diffusion's grid of timesteps whatever the checkpoint's config says, so each sampler here says
its grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from controlrt.runtime.errors import ParameterError, RequestError, UnknownNameError
from controlrt.runtime.samplers import SchedulerChoice
from controlrt.runtime.samplers.names import find_sampler, known_names

AUTOMATIC = "Automatic"
_LINSPACE = {"timestep_spacing": "linspace"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


@dataclass(frozen=True, kw_only=True)
class WebSampler:
    """A sampler of the web UI."""

    name: str
    aliases: tuple[str, ...] = ()
    automatic: str = "Uniform"
    """The schedule that it has where none is asked for."""
    grid: Mapping[str, Any] = field(default_factory=lambda: _LINSPACE)
    """Scheduler options of its uniform schedule."""
    eta: Literal["none", "one", "any"] = "none"
    """Whether noise is added at every step: never (``eta`` means nothing), always, or as much as ``eta`` says."""


SAMPLERS: Mapping[str, WebSampler] = {
    sampler.name: sampler
    for sampler in (
        WebSampler(name="DPM++ 2M", aliases=("k_dpmpp_2m",), automatic="Karras"),
        WebSampler(name="DPM++ SDE", aliases=("k_dpmpp_sde",), automatic="Karras", eta="one"),
        WebSampler(name="DPM++ 2M SDE", aliases=("k_dpmpp_2m_sde",), automatic="Exponential", eta="one"),
        WebSampler(name="DPM++ 2M SDE Heun", aliases=("k_dpmpp_2m_sde_heun",), automatic="Exponential", eta="one"),
        WebSampler(name="DPM++ 3M SDE", aliases=("k_dpmpp_3m_sde",), automatic="Exponential", eta="one"),
        WebSampler(name="Euler a", aliases=("k_euler_a", "k_euler_ancestral"), eta="one"),
        WebSampler(name="Euler", aliases=("k_euler",)),
        WebSampler(name="LMS", aliases=("k_lms",)),
        WebSampler(name="Heun", aliases=("k_heun",)),
        WebSampler(name="DPM2", aliases=("k_dpm_2",), automatic="Karras"),
        WebSampler(name="DPM2 a", aliases=("k_dpm_2_a",), automatic="Karras", eta="one"),
        WebSampler(name="DDIM", aliases=("ddim",), grid={**_LEADING, "clip_sample": False}, eta="any"),
        WebSampler(name="PLMS", aliases=("plms",), grid=_LEADING),
        WebSampler(name="UniPC", aliases=("unipc",)),
        WebSampler(name="LCM", aliases=("k_lcm",), grid={}),
    )
}
"""Those of the web UI that are here; "DPM++ 2S a", "DPM fast", "DPM adaptive", "Restart" and "DDIM CFG++" are not."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule of the web UI ("scheduler"), and our options for it."""

    name: str
    label: str
    options: Mapping[str, Any]


SCHEDULES: tuple[Schedule, ...] = (
    Schedule(name="automatic", label=AUTOMATIC, options={}),
    Schedule(name="uniform", label="Uniform", options={}),
    Schedule(name="karras", label="Karras", options={"use_karras_sigmas": True}),
    Schedule(name="exponential", label="Exponential", options={"use_exponential_sigmas": True}),
    # polyexponential with rho 1, which the web UI's is, is exponential
    Schedule(name="polyexponential", label="Polyexponential", options={"use_exponential_sigmas": True}),
    Schedule(name="sgm_uniform", label="SGM Uniform", options={"timestep_spacing": "trailing"}),
    Schedule(name="normal", label="Normal", options={}),
    Schedule(name="beta", label="Beta", options={"use_beta_sigmas": True}),
)
"""Those that are here; "KL Optimal", "Align Your Steps", "Simple" and "DDIM" are not."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request's sampler and schedule come to."""

    sampler: str
    """As the web UI calls it."""
    schedule: str
    """The schedule's label."""
    scheduler: SchedulerChoice
    """Our argument."""
    eta: float | None
    """Our argument; None to leave it out."""


def find_sampling(name: str, schedule: str | None, eta: float | None) -> Sampling:
    """What a sampler's name, with or without a schedule behind it, and a schedule stand for.

    Args:
        name: the web UI's, an alias of it, or one of ours; a schedule behind it goes before ``schedule``.
        schedule: name or label; None for automatic.
        eta: None for the sampler's own.

    Raises:
        RequestError: a sampler, a schedule or an eta that is not here.
    """
    found = _schedule(schedule)
    for one in SCHEDULES:
        for ending in (one.label, one.name, one.label.replace(" ", "")):
            if name.lower().endswith(f" {ending.lower()}"):
                name, found = name[: -len(ending) - 1], one
    known = {one.lower(): sampler for sampler in SAMPLERS.values() for one in (sampler.name, *sampler.aliases)}
    if name.lower() not in known:
        return _ours(name, found, eta)
    sampler = known[name.lower()]
    options = (_schedule(sampler.automatic) if found.label == AUTOMATIC else found).options
    ours, implied = find_sampler(sampler.name)
    unknown = [option for option in options if option not in ours.options]
    if unknown:
        raise RequestError(f"scheduler is {found.label!r}, which {sampler.name} does not take", "scheduler")
    final = {"final_sigmas_type": "zero"} if "final_sigmas_type" in ours.options else {}
    flags = {flag: False for flag in ours.options if flag.startswith("use_") and flag.endswith(("_sigmas", "_lambdas"))}
    grid = {option: value for option, value in sampler.grid.items() if option in ours.options}
    return Sampling(
        sampler=sampler.name,
        schedule=found.label,
        scheduler={"_class_name": ours.name, **flags, **grid, **final, **implied, **options},
        eta=_eta(sampler.name, sampler.eta, eta),
    )


def _ours(name: str, schedule: Schedule, eta: float | None) -> Sampling:
    """A sampler that the web UI does not have."""
    full = name if schedule.label == AUTOMATIC else f"{name} {schedule.label}"
    try:
        sampler, _ = find_sampler(full)
    except UnknownNameError:
        missing = UnknownNameError("sampler", full, [*SAMPLERS, *known_names()], show=SAMPLERS)
        raise RequestError(f"sampler_name: {missing}", "sampler_name") from None
    takes = "any" if "eta" in sampler.takes else "none"
    return Sampling(sampler=name, schedule=schedule.label, scheduler=full, eta=_eta(name, takes, eta))


def _schedule(name: str | None) -> Schedule:
    if not name:
        return SCHEDULES[0]
    for schedule in SCHEDULES:
        if name.lower() in (schedule.name, schedule.label.lower(), schedule.label.replace(" ", "").lower()):
            return schedule
    missing = UnknownNameError("scheduler", name, [schedule.label for schedule in SCHEDULES])
    raise RequestError(f"scheduler: {missing}", "scheduler")


def _eta(name: str, takes: str, eta: float | None) -> float | None:
    if eta is None or takes == "none":
        return None
    if takes == "any":
        return eta
    if eta != 1:
        raise RequestError(str(ParameterError("eta", eta, f"1, or left out, for {name}")), "eta")
    return None


def steps_from(strength: float, steps: int) -> int:
    """How many of ``steps`` picture to picture runs: with a strength of 0.75, 16 of 20."""
    return min(int(min(strength, 0.999) * steps) + 1, steps)


def steps_for(strength: float, wanted: int) -> int:
    """Of how many steps the second pass of hires fix runs the last ``wanted``."""
    return int(wanted / min(strength, 0.999)) if strength > 0 else wanted


def fraction(run: int, steps: int) -> float:
    """The least strength, in our sense, at which the last ``run`` of ``steps`` are run."""
    strength = run / steps
    return strength if int(steps * strength) >= run else math.nextafter(strength, 1)
