"""Which calls a calibration makes: examples, controls, samplers and guidance scales in turn."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controlrt.calibration.data import Example
from controlrt.runtime.errors import ParameterError, UserError
from controlrt.runtime.samplers import MAX_STEPS
from controlrt.runtime.samplers.names import find_sampler

SAMPLERS = ("DPM++ 2M", "Euler a", "DDIM")
"""A multistep solver, one that adds noise and the plainest: their latents differ most."""
GUIDANCE_SCALES = (7.5, 3.0, 1.0)
"""The last is without guidance."""


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """How much is seen, and of what."""

    cases: int = 16
    """Calls that statistics are of."""
    steps: int = 10
    samplers: tuple[str, ...] = SAMPLERS
    guidance_scales: tuple[float, ...] = GUIDANCE_SCALES
    size: tuple[int, int]
    """Width and height in pixels."""
    seed: int = 0
    unseen: int = 4
    """Further calls, of other examples, that no statistics are of."""

    def __post_init__(self) -> None:
        for option, value, lowest in (
            ("--cases", self.cases, 1),
            ("--unseen", self.unseen, 0),
            ("--seed", self.seed, 0),
        ):
            if value < lowest:
                raise ParameterError(option, value, f"a whole number of at least {lowest}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ParameterError("--steps", self.steps, f"from 1 to {MAX_STEPS}")
        for sampler in self.samplers:
            find_sampler(sampler)
        if not self.samplers:
            raise ParameterError("--samplers", "", "the name of a sampler, or several with commas between them")
        if not self.guidance_scales or not all(math.isfinite(scale) for scale in self.guidance_scales):
            raise ParameterError("--guidance", self.guidance_scales, "a number, or several with commas between them")


@dataclass(frozen=True, kw_only=True)
class PlannedCase:
    """One call."""

    number: int
    example: Example
    controls: tuple[str, ...]
    """Those that are on, by name."""
    sampler: str
    guidance_scale: float
    seed: int

    def __str__(self) -> str:
        guidance = f"guidance {self.guidance_scale:g}" if self.guidance_scale > 1 else "no guidance"
        return f"{self.example.name}: {'+'.join(self.controls) or 'no control'}, {self.sampler}, {guidance}"


def plan_cases(options: CollectOptions, examples: Sequence[Example], controls: Sequence[str]) -> list[PlannedCase]:
    """The calls, those that are unseen last.

    Args:
        options: how many, and of what.
        examples: the last ``options.unseen`` are for the unseen cases alone; the others come again where there are
            fewer than cases.
        controls: names of the bundle's controls: on one by one, and all together.

    Raises:
        UserError: too few examples, or a control that is never on in the cases that are seen.
    """
    seen = examples[: len(examples) - options.unseen]
    if not seen:
        raise UserError(
            f"the calibration set has {len(examples)} examples, and the last {options.unseen} are kept for comparison "
            "(--unseen); give more examples or a smaller --unseen"
        )
    sets = [(name,) for name in controls] + ([tuple(controls)] if len(controls) != 1 else [])
    mixed = _mix(options.cases + options.unseen, sets, options.samplers, options.guidance_scales)
    cases = []
    for number, (wanted, sampler, guidance_scale) in enumerate(mixed):
        unseen = number - options.cases
        example = examples[len(seen) + unseen] if unseen >= 0 else seen[number % len(seen)]
        cases.append(
            PlannedCase(
                number=number,
                example=example,
                controls=_controls(wanted, example),
                sampler=sampler,
                guidance_scale=guidance_scale,
                seed=options.seed + number,
            )
        )
    on = {name for case in cases[: options.cases] for name in case.controls}
    for name in controls:
        if name not in on:
            raise UserError(
                f"control {name} is never on in the {options.cases} cases, so nothing would be known of its layers; "
                "raise --cases, or give more examples its control pictures"
            )
    return cases


def _controls(wanted: tuple[str, ...], example: Example) -> tuple[str, ...]:
    """Those of ``wanted`` that the example has pictures of; all that it has where it has none of them."""
    return tuple(name for name in wanted if name in example.controls) or tuple(example.controls)


def _mix(count: int, *choices: Sequence[Any]) -> list[tuple[Any, ...]]:
    """``count`` combinations of one of each of ``choices``: always the one whose values, and then pairs of values, were
    used least so far."""
    values, pairs = Counter[tuple[int, int]](), Counter[tuple[tuple[int, int], tuple[int, int]]]()

    def used(combination: tuple[int, ...]) -> tuple[int, int]:
        places = list(enumerate(combination))
        return sum(values[place] for place in places), sum(pairs[pair] for pair in itertools.combinations(places, 2))

    mixed = []
    for _ in range(count):
        chosen = min(itertools.product(*(range(len(each)) for each in choices)), key=used)
        places = list(enumerate(chosen))
        values.update(places)
        pairs.update(itertools.combinations(places, 2))
        mixed.append(tuple(each[index] for each, index in zip(choices, chosen, strict=True)))
    return mixed
