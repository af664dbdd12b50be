"""What one picture of a bundle takes: the plan of its loop, and how often each program runs for it.

The picture is guided, unless the model is a consistency model, which takes no second row for its guidance.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.control_use import check_window, in_window
from controlrt.runtime.errors import BundleError, ParameterError, UnknownNameError
from controlrt.runtime.manifest import Cost, Program, Stage
from controlrt.runtime.plan import PER_STEP_STAGES, Layout, Plan, StepLayout, plan_denoising
from controlrt.runtime.samplers import compile_sampler

PROMPTS = 2
"""Of a guided picture: its prompt and the negative one, which is the empty prompt where none is given; likewise its
image prompt and none."""
EARLY_STAGES: tuple[Stage, ...] = ("timestep", "prompt", "prompt_timestep", "image", "hint")
"""What runs before the loop, in order."""


@dataclass(frozen=True, kw_only=True)
class ControlWindow:
    """When a control acts, as a call of the pipeline says it."""

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not abs(self.scale) < float("inf"):
            raise ParameterError("scale", self.scale, "a finite number")
        check_window("control_guidance", self.start, self.end)

    def active(self, step: int, steps: int) -> bool:
        """Whether the control runs at ``step`` of ``steps``."""
        return self.scale != 0 and in_window(step, steps, self.start, self.end)


@dataclass(frozen=True, kw_only=True)
class ProgramUse:
    """How one program serves one picture."""

    program: Program
    cost: Cost
    calls: int
    entries: int
    """Entries of one call that each cost as much: a stage that is tabled over steps makes all of them at once."""

    @property
    def flops(self) -> int:
        """FLOPs a picture."""
        return self.calls * self.entries * self.cost.flops


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One picture: the layout and plan of its loop, and every program of the bundle."""

    layout: Layout
    plan: Plan
    uses: tuple[ProgramUse, ...]


def plan_picture(bundle: Bundle, steps: int, controls: Mapping[str, ControlWindow] | None = None) -> Workload:
    """Plans one picture of the default size with the checkpoint's own sampler.

    Args:
        bundle: a compiled bundle.
        steps: denoising steps. A sampler may call the model more often.
        controls: the controls that act, by name; all of the bundle, at every step, where not given.

    Raises:
        UserError: a control that the bundle does not have, or a number of steps that cannot be.
        BundleError: the bundle is an export, which is not compiled yet.
    """
    layout = _layout(bundle, steps, controls)
    costs = {program.name: program.cost for program in bundle.manifest.programs if program.cost is not None}
    if len(costs) < len(bundle.manifest.programs):
        raise BundleError(f"{bundle.path} is an export, not compiled yet; compile it with build-engines")
    plan = plan_denoising(bundle.manifest, layout)
    launches = Counter(call.program for step in plan.steps for call in step)
    encoders = {encoder.program for encoder in bundle.manifest.text_encoders}
    encoders |= {adapter.program for adapter in bundle.manifest.ip_adapters}
    uses = tuple(
        ProgramUse(
            program=program,
            cost=costs[program.name],
            calls=_calls(program, plan, launches, encoders, PROMPTS if layout.guided else 1),
            entries=len(plan.steps) if program.stage in PER_STEP_STAGES else 1,
        )
        for program in bundle.manifest.programs
    )
    return Workload(layout=layout, plan=plan, uses=uses)


def _layout(bundle: Bundle, steps: int, controls: Mapping[str, ControlWindow] | None) -> Layout:
    """As the pipeline lays it out, with guidance at every step and the smallest batch there is."""
    known = bundle.manifest.controls
    names = {name: control.name for control in known for name in (*control.names, control.name)}
    windows = {control.name: ControlWindow() for control in known} if controls is None else controls
    for name in windows:
        if name not in names:
            raise UnknownNameError("control", name, names, "add it with: build-engines --controlnet NAME=SOURCE")
    table = compile_sampler(None, json.loads(bundle.file("scheduler.json").read_text()), steps)
    count = len(table)
    adapters = {control.name for control in known if control.kind == "adapter"}
    on = [{names[name] for name, window in windows.items() if window.active(step, count)} for step in range(count)]
    active = [[control.name for control in known if control.name in each] for each in on]
    width, height = bundle.manifest.profile.default_size
    return Layout(
        width=width,
        height=height,
        batch=bundle.manifest.profile.batch.low,
        tokens=bundle.manifest.profile.tokens.low,
        images=(1,) * len(bundle.manifest.ip_adapters),
        draws=bool(table.draws.any()),
        steps=tuple(
            StepLayout(
                controls=tuple(name for name in on if name not in adapters),
                adapters=tuple(name for name in on if name in adapters),
                guided=bundle.manifest.time_cond_proj_dim is None,
            )
            for on in active
        ),
    )


def _calls(program: Program, plan: Plan, launches: Counter[str], encoders: Container[str], prompts: int) -> int:
    """How often a picture calls ``program``, nothing being kept from an earlier one."""
    if program.stage in ("encode", "step"):
        return launches[program.name]
    if program.name in encoders:
        return prompts
    if program.stage is None:
        return 1 if program.name == "vae_decoder" else 0
    if program.part not in plan.parts:
        return 0
    return prompts if program.stage in ("prompt", "prompt_timestep", "image") else 1
