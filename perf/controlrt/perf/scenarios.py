"""What is measured: single stream, offline batches, mixed numbers of steps, sweeps. Parsed and checked at the edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from controlrt.perf.peers.calls import Call
from controlrt.perf.results import Axis, Kind
from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError
from controlrt.runtime.profile import ShapeProfile

AXES: tuple[Axis, ...] = get_args(Axis)
GUIDANCE_SCALE = 7.5
WARM_UP_SEED = 1_000_000
"""Calls before the measured ones have seeds of their own, so that no measured prompt was seen before."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One scenario to measure. What it does not say is the same for all of a run."""

    name: str
    kind: Kind
    axis: Axis | None = None
    value: float | None = None
    width: int
    height: int
    batch: int = 1
    steps: tuple[int, ...]
    """Of the calls of one round."""
    sampler: str
    controls: tuple[str, ...]

    @property
    def size(self) -> str:
        """``512x512``."""
        return f"{self.width}x{self.height}"

    def calls(self, round_number: int) -> list[Call]:
        """The calls of a measured round, counted from 0; of a warm-up, from -1 down."""
        each = len(self.steps) * self.batch
        first = round_number * each if round_number >= 0 else WARM_UP_SEED - round_number * each
        return [
            Call(
                seed=first + number * self.batch,
                batch=self.batch,
                width=self.width,
                height=self.height,
                steps=steps,
                sampler=self.sampler,
                guidance_scale=GUIDANCE_SCALE,
                controls=self.controls,
            )
            for number, steps in enumerate(self.steps)
        ]


def plan_tasks(
    single: Task, *, known_controls: Sequence[str], batches: str = "", steps_mix: str = "", sweeps: Sequence[str] = ()
) -> list[Task]:
    """The single stream, and whatever else was asked for.

    Args:
        single: the single stream.
        known_controls: ControlNets that there are, in order.
        batches: ``1,2,4,8``.
        steps_mix: ``10,20,50``.
        sweeps: ``steps=5,10,20``, ``batch=1,2``, ``resolution=256x256,512x512`` or ``controls=1,2``, any number.

    Raises:
        UserError: one that cannot be, said in one line.
    """
    tasks = [single]
    tasks += [
        replace(single, name=f"offline, batch {batch}", kind="offline", batch=batch)
        for batch in _numbers("--batches", batches)
    ]
    mix = _numbers("--steps-mix", steps_mix)
    if mix:
        tasks.append(replace(single, name="mixed steps", kind="mixed-steps", steps=tuple(mix)))
    for sweep in sweeps:
        axis, equals, values = sweep.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep {sweep!r} is not AXIS=VALUE,...; for example: --sweep steps=5,10,20")
        if axis not in AXES:
            raise UnknownNameError("axis of --sweep", axis, AXES)
        tasks += _sweep(single, axis, values, known_controls)
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is asked for twice; name each value once")
    return tasks


def _sweep(single: Task, axis: str, values: str, known_controls: Sequence[str]) -> list[Task]:
    option = f"--sweep {axis}"
    if axis == "resolution":
        return [
            replace(
                single, name=f"sweep, {w}x{h}", kind="sweep", axis="resolution", value=float(w * h), width=w, height=h
            )
            for w, h in map(parse_size, values.split(","))
        ]
    numbers = _numbers(option, values)
    if axis == "batch":
        return [
            replace(single, name=f"sweep, batch {n}", kind="sweep", axis="batch", value=float(n), batch=n)
            for n in numbers
        ]
    if axis == "steps":
        return [
            replace(single, name=f"sweep, {n} steps", kind="sweep", axis="steps", value=float(n), steps=(n,))
            for n in numbers
        ]
    for n in numbers:
        if n > len(known_controls):
            raise ParameterError(option, n, f"at most {len(known_controls)}: there are {', '.join(known_controls)}")
    return [
        replace(
            single,
            name=f"sweep, {n} ControlNet{'s' * (n > 1)}",
            kind="sweep",
            axis="controls",
            value=float(n),
            controls=tuple(known_controls[:n]),
        )
        for n in numbers
    ]


def parse_size(text: str) -> tuple[int, int]:
    """``512x512`` as width and height.

    Raises:
        UserError: anything but one size that a profile could have.
    """
    profile = ShapeProfile.parse(text)
    if len(profile.sizes) > 1 or profile.widths.low < profile.widths.high or profile.heights.low < profile.heights.high:
        raise ParameterError("size", text, "one size, such as 512x512; ranges are measured with --sweep resolution=...")
    return profile.default_size


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ParameterError(option, text, "whole numbers of at least 1, with commas between")
    return [int(part) for part in parts]
