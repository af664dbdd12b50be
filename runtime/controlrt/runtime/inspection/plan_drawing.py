"""A plan drawn as text: what runs before the loop, its steps with equal ones folded, and the buffers between them."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.inspection.program_table import when
from controlrt.runtime.inspection.units import readable_bytes
from controlrt.runtime.inspection.workload import EARLY_STAGES, ProgramUse, Workload
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.plan import STATE, Call, Plan, View, stage_buffer

WIDTH = 116
"""Columns that a line of buffers may take."""
_ZERO = "zero"
"""What residual buffers that nothing writes are called."""


@dataclass(frozen=True)
class _Drawn:
    """A call as it is drawn: the same at every step at which it does the same."""

    program: str
    reads: tuple[str, ...]
    """What other calls wrote."""
    given: tuple[str, ...]
    """What the pipeline writes for a request: scales, coefficients, noise."""
    writes: tuple[str, ...]


def draw_plan(bundle: Bundle, work: Workload) -> Iterator[str]:
    """Lines of a drawing of ``work``. ``<-`` is what a program reads, ``->`` what it writes."""
    layout, manifest = work.layout, bundle.manifest
    pictures = "1 picture" if layout.batch == 1 else f"{layout.batch} pictures"
    rows = f"guided: {layout.rows} rows, unconditional ones first" if layout.guided else "a row for each"
    yield f"{pictures} of {layout.width}x{layout.height}, {rows}"
    yield ""
    yield "before the loop"
    yield from _draw_early(work, manifest)
    yield ""
    steps = len(work.plan.steps)
    yield f"the loop: {steps} steps, {sum(map(len, work.plan.steps))} launches"
    drawing = _Drawing(work.plan, manifest)
    for first, last, calls in fold(drawing.steps()):
        name = f"step {first}" if first == last else f"steps {first}-{last}"
        yield f"  {name}: {' -> '.join(call.program for call in calls)}"
        for call in calls:
            yield f"    {call.program}"
            yield from _listed("<-", call.reads)
            yield from _listed("<- from the request:", call.given)
            yield from _listed("->", call.writes)
    yield ""
    yield "after the loop"
    result = drawing.name(View(work.plan.result))
    yield f"  vae_decoder: {result} -> picture"


def fold(steps: Iterable[tuple[_Drawn, ...]]) -> Iterator[tuple[int, int, tuple[_Drawn, ...]]]:
    """Runs of equal steps: the first, the last, and what they do."""
    numbered = enumerate(steps)
    for calls, run in itertools.groupby(numbered, key=lambda pair: pair[1]):
        numbers = [number for number, _ in run]
        yield numbers[0], numbers[-1], calls


def _draw_early(work: Workload, manifest: Manifest) -> Iterator[str]:
    """The text encoders and the stages of every part that the plan calls, by when they run."""
    names = [encoder.program for encoder in manifest.text_encoders]
    names += [adapter.program for adapter in manifest.ip_adapters]
    stages = (manifest.stage(part, stage) for stage in EARLY_STAGES for part in work.plan.parts)
    names += [program.name for program in stages if program is not None]
    by_time: dict[str, list[ProgramUse]] = {}
    used = {use.program.name: use for use in work.uses}
    for use in map(used.__getitem__, names):
        entries = f", {use.entries} timesteps at once" if use.entries > 1 else ""
        by_time.setdefault(f"{when(use.program)}{entries}", []).append(use)
    for time, uses in by_time.items():
        yield f"  {time}"
        for use in uses:
            inputs = ", ".join(spec.name for spec in use.program.inputs)
            yield from _wrapped(f"{use.program.name}: {inputs} -> {', '.join(_made(use, work.plan))}", indent=4)


def _made(use: ProgramUse, plan: Plan) -> Iterator[str]:
    """The outputs of a program before the loop, with the buffers that they fill."""
    for spec in use.program.outputs:
        buffer = stage_buffer(spec.name, use.program.part)
        if buffer in plan.buffers:
            shape, dtype = plan.buffers[buffer]
            size = readable_bytes(math.prod(shape) * np.dtype(dtype).itemsize)
            yield f"{buffer} ({'x'.join(map(str, shape))} {dtype}, {size})"
        else:
            yield spec.name


class _Drawing:
    """Names of a plan's buffers as they are drawn."""

    def __init__(self, plan: Plan, manifest: Manifest) -> None:
        self._plan = plan
        early = {
            stage_buffer(spec.name, program.part)
            for program in manifest.programs
            if program.stage in EARLY_STAGES
            for spec in program.outputs
        }
        written = {view.buffer for calls in plan.steps for call in calls for view in call.outputs.values()}
        self._flowing = early | written | {f"{state}.{turn}" for state in STATE for turn in (0, 1)}

    def steps(self) -> list[tuple[_Drawn, ...]]:
        """Every step's calls."""
        return [tuple(map(self._draw, calls)) for calls in self._plan.steps]

    def name(self, view: View) -> str:
        """What a view is called: ``timestep_0.unet[step]``, ``latents``, ``residuals.a``."""
        stem, _, end = view.buffer.rpartition(".")
        if stem in STATE:
            return stem
        if stem.startswith("residual_"):
            return f"residuals.{end}"
        rows = f", conditional rows {view.rows.start}-{view.rows.stop - 1}" if view.rows is not None else ""
        return f"{view.buffer}{'[step]' if view.step is not None else ''}{rows}"

    def _draw(self, call: Call) -> _Drawn:
        flows = [view for view in call.inputs.values() if self._flows(view)]
        given = [view for view in call.inputs.values() if not self._flows(view)]
        return _Drawn(
            program=call.program,
            reads=self._names(flows),
            given=self._names(given),
            writes=self._names(call.outputs.values()),
        )

    def _flows(self, view: View) -> bool:
        return view.buffer in self._flowing or view.buffer.endswith(f".{_ZERO}")

    def _names(self, views: Iterable[View]) -> tuple[str, ...]:
        """Each name once, with the number and size of the buffers where it stands for several."""
        named: dict[str, list[View]] = {}
        for view in views:
            named.setdefault(self.name(view), []).append(view)
        return tuple(
            f"{name} ({len(several)} tensors, {readable_bytes(sum(map(self._bytes, several)))})"
            if len(several) > 1
            else name
            for name, several in named.items()
        )

    def _bytes(self, view: View) -> int:
        shape, dtype = self._plan.buffers[view.buffer]
        return math.prod(shape) * np.dtype(dtype).itemsize


def _listed(sign: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield from _wrapped(f"{sign} {', '.join(names)}", indent=6)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 3),
        break_long_words=False,
        break_on_hyphens=False,
    )
