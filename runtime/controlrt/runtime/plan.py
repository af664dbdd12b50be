"""A run as a plan: program calls on fixed buffers, laid out before the first launch.

What changes from picture to picture (prompts, hints, scales, noise, sampler coefficients) is bytes in the buffers;
what the plan fixes is their shapes and which programs run at which step. A step at which a ControlNet is off
has no call of it, and one without guidance runs the conditional rows alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from controlrt.runtime.errors import BundleError
from controlrt.runtime.image_tokens import image_dimension
from controlrt.runtime.manifest import Manifest, Program, Stage, TensorSpec
from controlrt.runtime.profile import CHUNK_TOKENS


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """What runs at one step."""

    controls: tuple[str, ...]
    """The ControlNets that are on, in the order of the bundle."""
    conditional: tuple[str, ...] = ()
    """Those of them that act on the conditional rows alone, as in guess mode; they are not run on the others."""
    adapters: tuple[str, ...] = ()
    """The T2I-Adapters that are on, in the order of the bundle."""
    mixtures: tuple[tuple[str, int], ...] = ()
    """ControlNets of which other control pictures count than at first, as of a union whose types have windows of their
    own, and the number of their mixture."""
    guided: bool
    """Whether each picture takes two rows, unconditional then conditional, for classifier-free guidance."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides a plan."""

    width: int
    height: int
    batch: int
    tokens: int = CHUNK_TOKENS
    """Of each prompt: 77 for each of its chunks."""
    images: tuple[int, ...] = ()
    """Pictures that each IP-Adapter is shown, in the order of the bundle; 1 where it is shown none."""
    draws: bool
    """Whether the sampler draws noise; without, one zero buffer serves every step."""
    steps: tuple[StepLayout, ...]

    @property
    def guided(self) -> bool:
        """Whether any step is guided."""
        return any(step.guided for step in self.steps)

    @property
    def rows(self) -> int:
        """Rows of the model's batch: one per picture, two where a step is guided."""
        return self.batch * (2 if self.guided else 1)


@dataclass(frozen=True)
class View:
    """A buffer, or one step's entry of a buffer that is a table over steps, or some of its rows."""

    buffer: str
    step: int | None = None
    rows: range | None = None


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
    parts: tuple[str, ...]
    """The parts that are called."""
    adapter_sets: tuple[tuple[str, ...], ...] = ()
    """Adapters that are on together at some step; each set has buffers of its own."""

    def state(self, name: str, step: int) -> str:
        """The buffer that holds ``name``, the latents or the history, before ``step``."""
        return _turn(name, step)

    def inputs(self) -> tuple[str, ...]:
        """The buffers that a call fills: what programs read and no program of the plan makes, but for residuals, which
        are zeros where nothing makes them; and the state before the first step."""
        made = {view.buffer for calls in self.steps for call in calls for view in call.outputs.values()}
        made -= {_turn(name, 0) for name in STATE}
        return tuple(name for name in self.buffers if name not in made and not name.startswith("residual_"))


_KEPT_FRAMES = 4

PER_STEP = ("input_scale", "guidance", "update", "clip", "conditioning_scale", "ip_scale", "blend")
"""Inputs that are tables over steps; noise is one too where the sampler draws it."""
PER_STEP_STAGES: tuple[Stage, ...] = ("timestep", "prompt_timestep")
"""Stages whose outputs are tables over steps."""
STATE = ("latents", "history")
"""What a step passes on to the next, in two buffers that take turns."""
UNGUIDED = "guidance.off"
"""The guidance matrix of a step without guidance: the identity."""
HALF = ":half"
"""How the names of tables end that hold the conditional rows of another: a row of a table is small, and engines want
memory that is aligned."""
OWN_INPUTS = ("conditioning_scale", "region_")
"""How the names of inputs begin that each ControlNet has a buffer of its own for."""


def plan_denoising(manifest: Manifest, layout: Layout) -> Plan:
    """Lays out the denoising loop of ``manifest`` for ``layout``; see ``Planner.plan``."""
    return Planner(manifest).plan(layout)


class Planner:
    """Lays out the denoising loops of a bundle.

    A control window or a scale of 0 at some steps moves calls and makes few new ones: those of layouts that differ in
    nothing else are remembered, so that such a plan costs next to nothing and has the very same ``Call`` objects.
    Any thread may ask.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._lock = threading.Lock()
        self._frames: OrderedDict[Layout, _Frame] = OrderedDict()

    def plan(self, layout: Layout) -> Plan:
        """The plan of ``layout``.

        The residuals of several ControlNets accumulate by chaining: each reads the sum so far and writes the new sum
        into the other of two buffer sets. The first one of a step, and a UNet without control, read zeros. ControlNets
        that act on the conditional rows alone come first, in two sets of their own whose other rows stay zero.
        """
        with self._lock:
            return self._plan(layout)

    def _plan(self, layout: Layout) -> Plan:
        bare = tuple(StepLayout(controls=(), guided=layout.guided) for _ in layout.steps)
        key = replace(layout, steps=bare)
        frame = self._frames.get(key) or self._frames.setdefault(key, _Frame(self._manifest, layout))
        self._frames.move_to_end(key)
        while len(self._frames) > _KEPT_FRAMES:
            self._frames.popitem(last=False)
        steps = [frame.step_calls(step, each) for step, each in enumerate(layout.steps)]
        laid = [each for calls in steps for each in calls]
        named = dict.fromkeys(each.buffers for each in laid)  # steps have much in common
        names = dict.fromkeys(name for buffers in named for name in buffers)
        adapters = {f"adapter.{name}": None for step in layout.steps for name in step.adapters}
        return Plan(
            buffers={name: frame.buffers[name] for name in names},
            steps=tuple(tuple(each.call for each in calls) for calls in steps),
            result=_turn("latents", len(layout.steps)),
            parts=tuple(adapters | dict.fromkeys(each.part for each in laid)),
            adapter_sets=tuple(dict.fromkeys(step.adapters for step in layout.steps if step.adapters)),
        )


def stage_buffer(name: str, part: str, mixture: int = 0) -> str:
    """The buffer that holds ``name``, an output of an earlier stage of ``part``, of one mixture of control pictures."""
    return f"{name}.{part}:{mixture}" if mixture else f"{name}.{part}"


def adapter_buffer(name: str, adapters: Sequence[str]) -> str:
    """The buffer that holds ``name``, the sum of one feature of these adapters."""
    return f"{name}.{'+'.join(adapters) or 'off'}"


def _buffers(view: View) -> Iterator[str]:
    """The buffers that a view is about: its own, and the table that a table of half the rows is made of."""
    if view.buffer.endswith(HALF):
        yield view.buffer.removesuffix(HALF)
    yield view.buffer


def _turn(state: str, step: int) -> str:
    return f"{state}.{step % 2}"


@dataclass(frozen=True, kw_only=True)
class _Laid:
    """A call, of which part, and the buffers that it is about."""

    call: Call
    part: str
    buffers: tuple[str, ...]


class _Frame:
    """The calls of all layouts that differ in nothing but what is on at which step."""

    def __init__(self, manifest: Manifest, layout: Layout) -> None:
        self.manifest, self.layout = manifest, layout
        self.guided, self.steps = layout.guided, len(layout.steps)
        self.buffers: dict[str, tuple[tuple[int, ...], str]] = {}
        """Of all calls so far."""
        self._calls: dict[tuple[object, ...], _Laid] = {}
        self._steps: dict[tuple[int, StepLayout], tuple[_Laid, ...]] = {}
        self.dimensions = {"batch": layout.batch, "rows": layout.rows, "tokens": layout.tokens}
        self.dimensions |= {"height": layout.height, "width": layout.width}
        for power in range(7):
            self.dimensions[f"height/{2**power}"] = layout.height // 2**power
            self.dimensions[f"width/{2**power}"] = layout.width // 2**power
        self.dimensions |= {
            image_dimension(number, adapter.tokens): images * adapter.tokens
            for number, (adapter, images) in enumerate(zip(manifest.ip_adapters, layout.images, strict=True))
        }
        self.early = {
            (program.part, output.name): program.stage
            for program in manifest.programs
            if program.stage not in (None, "step")
            for output in program.outputs
        }

    def step_calls(self, step: int, on: StepLayout) -> tuple[_Laid, ...]:
        """The calls of a step at which this is on."""
        if (step, on) not in self._steps:
            self._steps[step, on] = tuple(self._lay(step, on))
        return self._steps[step, on]

    def _lay(self, step: int, on: StepLayout) -> Iterator[_Laid]:
        half = on.conditional if on.guided else ()
        fused = None if half else self.manifest.fused(on.controls)
        if fused is not None:
            yield self._call(fused, step, on, "zero", "zero", "")
            return
        residuals = "zero"
        if self.manifest.stage("unet", "encode") is not None:
            yield self._call("unet", step, on, "zero", "zero", "", stage="encode")
        names = [control.name for control in self.manifest.controls if control.name in on.controls]
        for name in sorted(names, key=lambda each: each not in half):  # sums do not mind the order
            sets = ("half.a", "half.b") if name in half else ("a", "b")
            written = sets[residuals == sets[0]]
            yield self._call(f"controlnet.{name}", step, on, residuals, written, name, half=name in half)
            residuals = written
        yield self._call("unet", step, on, residuals, residuals, "")

    def _call(
        self,
        part: str,
        step: int,
        on: StepLayout,
        read: str,
        write: str,
        control: str,
        *,
        half: bool = False,
        stage: Stage = "step",
    ) -> _Laid:
        half = half or not on.guided
        key = (part, step, read, write, control, half, stage, on.guided, on.adapters, on.mixtures)
        if key not in self._calls:
            program = self.manifest.stage(part, stage)
            if program is None:
                raise BundleError(f"the bundle has no {stage} program of {part}; build it again with build-engines")
            inputs = {spec.name: self._input(program, spec, step, on, read, control, half) for spec in program.inputs}
            outputs = {spec.name: self._output(program, spec, step, write, half) for spec in program.outputs}
            call = Call(program=program.name, inputs=inputs, outputs=outputs)
            names = dict.fromkeys(name for view in (*inputs.values(), *outputs.values()) for name in _buffers(view))
            self._calls[key] = _Laid(call=call, part=part, buffers=tuple(names))
        return self._calls[key]

    def _input(
        self, program: Program, spec: TensorSpec, step: int, on: StepLayout, read: str, control: str, half: bool
    ) -> View:
        stage = self.early.get((program.part, spec.name))
        if stage is not None:
            tabled = stage in PER_STEP_STAGES
            mixture = dict(on.mixtures).get(control, 0) if stage == "hint" else 0
            return self._view(stage_buffer(spec.name, program.part, mixture), spec, step, half, tabled=tabled)
        if spec.name.startswith("residual_"):
            return self._view(f"{spec.name.removesuffix('_in')}.{read}", spec, step, half)
        if spec.name.startswith("adapter_"):
            return self._view(adapter_buffer(spec.name, on.adapters), spec, step, half)
        if spec.name in STATE:
            return self._view(_turn(spec.name, step), spec, step, half)
        if spec.name in ("guidance", "conditional") and not on.guided:
            self.buffers[UNGUIDED] = (self.layout.batch, self.layout.batch), spec.dtype
            return View(UNGUIDED)
        kind = spec.name.partition(".")[0]
        name = f"{spec.name}.{control}" if control and spec.name.startswith(OWN_INPUTS) else spec.name
        tabled = kind in PER_STEP or (spec.name == "noise" and self.layout.draws)
        return self._view(name, spec, step, half, tabled=tabled)

    def _output(self, program: Program, spec: TensorSpec, step: int, residuals: str, half: bool) -> View:
        if program.stage == "encode":
            return self._view(stage_buffer(spec.name, program.part), spec, step, half)
        if spec.name.removeprefix("next_") in STATE:
            return self._view(_turn(spec.name.removeprefix("next_"), step + 1), spec, step, half)
        return self._view(f"{spec.name}.{residuals}", spec, step, half)

    def _view(self, buffer: str, spec: TensorSpec, step: int, half: bool, *, tabled: bool = False) -> View:
        """A view of ``buffer``, which is laid out; with ``half`` of the conditional rows, where there are others."""
        shape = tuple(dim if isinstance(dim, int) else self.dimensions[dim] for dim in spec.shape)
        known = self.buffers.setdefault(buffer, ((self.steps, *shape) if tabled else shape, spec.dtype))
        if known[0][-len(shape) :] != shape or known[1] != spec.dtype:
            raise BundleError(
                f"programs disagree on {buffer}: {known[1]} {known[0]} against {spec.dtype} {shape}; build the bundle "
                "again with build-engines"
            )
        rows = None
        if spec.shape[:1] == ("rows",) and self.guided and half:
            if tabled:
                batch = self.layout.batch
                self.buffers[buffer + HALF] = (self.steps, batch, *shape[1:]), spec.dtype
                return View(buffer + HALF, step)
            first = 0 if spec.name == "rows" else self.layout.batch  # the conditional half; pictures 0, 1, ...
            rows = range(first, first + self.layout.batch)
        return View(buffer, step if tabled else None, rows)
