"""A run as a plan: program calls on fixed buffers, laid out before the first launch.

What changes from picture to picture (prompts, hints, scales, noise, sampler coefficients) is bytes in the buffers;
what the plan fixes is their shapes and which programs run at which step. A step at which a ControlNet is off
has no call of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlrt.runtime.manifest import Manifest, Program, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides a plan."""

    width: int
    height: int
    batch: int
    guided: bool
    """Whether each picture takes two rows, unconditional then conditional, for classifier-free guidance."""
    draws: bool
    """Whether the sampler draws noise; without, one zero buffer serves every step."""
    active: tuple[tuple[str, ...], ...]
    """For each step, the controls that run."""

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.active)

    @property
    def rows(self) -> int:
        """Rows of the model's batch: one per picture, two with guidance."""
        return self.batch * (2 if self.guided else 1)


@dataclass(frozen=True)
class View:
    """A buffer, or one step's row of a buffer that is a table over steps."""

    buffer: str
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One launch: which views a program reads and writes, by its tensor names."""

    program: str
    inputs: dict[str, View]
    outputs: dict[str, View]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Buffers (name to shape and dtype) and the calls of each step."""

    buffers: dict[str, tuple[tuple[int, ...], str]]
    steps: tuple[tuple[Call, ...], ...]
    result: str
    """The buffer that holds the final latents."""

    def latents(self, step: int) -> str:
        """The buffer that holds the latents before ``step``."""
        return _turn("latents", step)


PER_STEP = ("timestep", "input_scale", "guidance", "update", "clip", "conditioning_scale")
"""Inputs that are tables over steps; noise is one too where the sampler draws it."""
STATE = ("latents", "history")
"""What a step passes on to the next, in two buffers that take turns."""


def plan_denoising(manifest: Manifest, layout: Layout) -> Plan:
    """Lays out the denoising loop of ``manifest`` for ``layout``.

    The residuals of several ControlNets accumulate by chaining: each reads the sum so far and writes the new sum
    into the other of two buffer sets. The first one of a step, and a UNet without control, read zeros.
    """
    planner = _Planner(manifest, layout)
    for step, active in enumerate(layout.active):
        planner.add_step(step, active)
    return Plan(buffers=planner.buffers, steps=tuple(planner.steps), result=_turn("latents", layout.steps))


def _turn(state: str, step: int) -> str:
    return f"{state}.{step % 2}"


class _Planner:
    def __init__(self, manifest: Manifest, layout: Layout) -> None:
        self.manifest, self.layout = manifest, layout
        self.buffers: dict[str, tuple[tuple[int, ...], str]] = {}
        self.steps: list[tuple[Call, ...]] = []
        self.dimensions = {"batch": layout.batch, "rows": layout.rows, "height": layout.height, "width": layout.width}
        for power in range(7):
            self.dimensions[f"height/{2**power}"] = layout.height // 2**power
            self.dimensions[f"width/{2**power}"] = layout.width // 2**power

    def add_step(self, step: int, active: tuple[str, ...]) -> None:
        calls, residuals = [], "zero"
        for control in self.manifest.controls:
            if control.name in active:
                written = "b" if residuals == "a" else "a"
                calls.append(self._call(control.program, step, residuals, written, control.name))
                residuals = written
        calls.append(self._call("unet", step, residuals, residuals, ""))
        self.steps.append(tuple(calls))

    def _call(self, name: str, step: int, read: str, write: str, control: str) -> Call:
        program: Program = self.manifest.program(name)
        inputs = {spec.name: self._input(spec, step, read, control) for spec in program.inputs}
        outputs = {spec.name: self._output(spec, step, write) for spec in program.outputs}
        return Call(program=name, inputs=inputs, outputs=outputs)

    def _input(self, spec: TensorSpec, step: int, residuals: str, control: str) -> View:
        if spec.name.startswith("residual_"):
            return self._view(f"{spec.name.removesuffix('_in')}.{residuals}", spec)
        if spec.name in STATE:
            return self._view(_turn(spec.name, step), spec)
        name = f"{spec.name}.{control}" if spec.name in ("hint", "conditioning_scale") else spec.name
        tabled = spec.name in PER_STEP or (spec.name == "noise" and self.layout.draws)
        return self._view(name, spec, step if tabled else None)

    def _output(self, spec: TensorSpec, step: int, residuals: str) -> View:
        if spec.name.removeprefix("next_") in STATE:
            return self._view(_turn(spec.name.removeprefix("next_"), step + 1), spec)
        return self._view(f"{spec.name}.{residuals}", spec)

    def _view(self, buffer: str, spec: TensorSpec, step: int | None = None) -> View:
        shape = tuple(dim if isinstance(dim, int) else self.dimensions[dim] for dim in spec.shape)
        self.buffers[buffer] = (shape if step is None else (self.layout.steps, *shape), spec.dtype)
        return View(buffer, step)
