"""Single steps of several drawings together, each at its own place in its own schedule.

Whatever a step reads of a picture (timestep, coefficients, scales, prompt, hint, noise) is a row of its own, so the
rows of a batch need not belong to one call. A drawing keeps its inputs and its state in the host's memory; a step
gathers the rows of all drawings that do the same thing next into the buffers of a plan of one step, as iteration-level
scheduling does for language models (Yu et al. 2022, Orca, OSDI).

Where programs run in the host's memory, a drawing without company moves into a bound plan of its own layout, and takes
its steps there as a call of the pipeline does: nothing is gathered.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.drawing import Drawing
from controlrt.runtime.errors import DeviceMemoryError, NotFiniteError
from controlrt.runtime.executors import BoundPlan, Executor, HostExecutor, HostPlan
from controlrt.runtime.plan import HALF, STATE, UNGUIDED, Layout, Plan, StepLayout, View, plan_denoising
from controlrt.runtime.samplers.table import HISTORY, OUTPUT_COLUMN
from controlrt.runtime.vae import Vae, check_finite

_KEPT_PLANS = 16
_KEPT_WHOLE_PLANS = 4
_OWN = ("rows", "guidance", "conditional", UNGUIDED)
"""Inputs that say which rows belong to which picture."""
_serials = itertools.count()


@dataclass(frozen=True)
class Kind:
    """What drawings have in common that can take a step together."""

    width: int
    height: int
    tokens: int
    images: tuple[int, ...]
    step: StepLayout


class Staged:
    """A drawing with memory of its own, somewhere between its first step and its last.

    Args:
        plan: of the drawing's layout.
        drawing: what to draw; ``buffers`` are to be filled with it, by ``ControlNetPipeline.fill``.
    """

    def __init__(self, plan: Plan, drawing: Drawing) -> None:
        self.plan, self.drawing, self.serial = plan, drawing, next(_serials)
        self.buffers: MutableMapping[str, NDArray[Any]] = {}
        for name in self.plan.inputs():
            shape, dtype = self.plan.buffers[name]
            self.buffers[name] = np.zeros(shape, dtype)
        self.whole: HostPlan | None = None
        """What it has its memory in, where it is not its own."""
        self.step = 0
        """The next one."""

    @property
    def batch(self) -> int:
        """How many pictures it is."""
        return self.drawing.layout.batch

    @property
    def steps(self) -> int:
        """How many it takes."""
        return len(self.drawing.layout.steps)

    @property
    def done(self) -> bool:
        """Whether ``latents`` are final."""
        return self.step == self.steps

    @property
    def kind(self) -> Kind:
        """Of its next step."""
        return self._kind(self.drawing.layout.steps[self.step])

    @property
    def kinds(self) -> set[Kind]:
        """Of all its steps."""
        return {self._kind(step) for step in set(self.drawing.layout.steps)}

    @property
    def latents(self) -> NDArray[np.float32]:
        """(batch, channels, height/8, width/8)."""
        return self.state("latents")

    def state(self, name: str) -> NDArray[np.float32]:
        """Its latents or history. In memory of its own they stay in one place, in a plan's they take turns."""
        return self.buffers[self.plan.state(name, 0 if self.whole is None else self.step)]

    def move_into(self, whole: HostPlan) -> None:
        """Moves to the memory of a bound plan of its layout."""
        for name, value in self.buffers.items():
            whole.buffers[name][...] = value
        for name in STATE:
            whole.buffers[self.plan.state(name, self.step)][...] = self.state(name)
        self.buffers, self.whole = whole.buffers, whole

    def move_out(self) -> None:
        """Leaves that memory to others and takes its state along; once it is done."""
        self.buffers = {self.plan.state(name, 0): self.state(name).copy() for name in STATE}
        self.whole = None

    def keep_predictions(self) -> None:
        """Has the steps leave the picture that they predict in the last entry of the history, where the sampler has no
        use for it; once the buffers are filled."""
        if len(self.drawing.table.history) < HISTORY:
            row = self.buffers["update"][:, :, HISTORY]
            row[..., 0] = self.drawing.table.predicted[:, None, 0]
            row[..., OUTPUT_COLUMN] = self.drawing.table.predicted[:, None, 1]

    def predicted(self) -> NDArray[np.float32]:
        """The latents that the last step predicts, (batch, ...); or those that it left, of the variance that the model
        sees, where the sampler needs all of the history."""
        if len(self.drawing.table.history) < HISTORY:
            return self.state("history")[:, HISTORY - 1]
        return self.latents * np.float32(self.drawing.table.input_scale[min(self.step, self.steps - 1)])

    def advance(self, latents: NDArray[np.float32], history: NDArray[np.float32]) -> None:
        """Takes over what a step made."""
        self.step += 1
        self.state("latents")[...] = latents
        self.state("history")[...] = history

    def _kind(self, step: StepLayout) -> Kind:
        layout = self.drawing.layout
        return Kind(layout.width, layout.height, layout.tokens, layout.images, step)


@dataclass(frozen=True, kw_only=True)
class _Input:
    """An input of a step whose rows are gathered."""

    source: str
    """The buffer of a drawing's plan that has them."""
    target: NDArray[Any]
    """(batch or rows, ...), without an axis of steps."""
    by_picture: bool
    """Whether it has a row for each picture; else one for each row of the model's batch."""
    state: str
    """Which of the drawing's state it is, where it is that."""
    changes: bool
    """Whether it is another at every step."""


@dataclass
class _StepPlan:
    """A plan of one step with memory behind it, and whose rows lie in it."""

    bound: BoundPlan
    batch: int
    inputs: tuple[_Input, ...]
    changing: tuple[_Input, ...]
    """Those of them that are others at every step."""
    placed: dict[int, int]
    """Where the drawings of the last step lie, first row by serial number."""


class Stepper:
    """Takes steps of staged drawings on one executor. One thread's own.

    Args:
        bundle: an opened bundle.
        executor: of the bundle; it stays the caller's.
    """

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        self._manifest, self._executor = bundle.manifest, executor
        self._host = executor if isinstance(executor, HostExecutor) else None
        self._vae = Vae(bundle.manifest, executor)
        self._plans: OrderedDict[tuple[Kind, int], _StepPlan] = OrderedDict()
        self._whole: OrderedDict[Layout, tuple[HostPlan, weakref.ref[Staged]]] = OrderedDict()
        """Plans of all steps, and who was the last to move into each."""

    def step(self, drawings: Sequence[Staged]) -> None:
        """Takes the next step of drawings of one kind, together of as many pictures as the bundle allows."""
        if len(drawings) == 1 and (drawings[0].whole is not None or self._moved_in(drawings[0])):
            _step_alone(drawings[0])
            return
        kinds = {drawing.kind for drawing in drawings}
        if len(kinds) != 1:
            raise ValueError(f"{len(kinds)} kinds of steps cannot be taken together")
        plan = self._plan(kinds.pop(), sum(drawing.batch for drawing in drawings))
        first = 0
        _clear_guidance(plan)
        for drawing in drawings:
            self._gather(plan, drawing, first)
            first += drawing.batch
        plan.placed = dict(
            zip(
                (drawing.serial for drawing in drawings),
                itertools.accumulate((drawing.batch for drawing in drawings), initial=0),
                strict=False,
            )
        )
        ran = plan.bound.run(decode=False, history=True)
        check_finite(ran.latents)  # one's infinities times the others' zeros would be theirs too
        assert ran.history is not None
        for drawing in drawings:
            rows = slice(plan.placed[drawing.serial], plan.placed[drawing.serial] + drawing.batch)
            drawing.advance(ran.latents[rows], ran.history[rows])

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pictures of final latents: (batch, height, width, 3) in [0, 1]."""
        return self._vae.decode(latents)

    def close(self) -> None:
        """Releases the plans' memory; safe to call twice, and to go on after."""
        self._whole.clear()
        while self._plans:
            self._plans.popitem()[1].bound.close()

    def _moved_in(self, drawing: Staged) -> bool:
        """Whether there was a whole plan for a drawing to move into; there are few of them."""
        if self._host is None:
            return False
        layout = drawing.drawing.layout
        if layout in self._whole:
            if not self._is_vacant(layout):
                return False
            whole, _ = self._whole.pop(layout)
        else:
            if len(self._whole) >= _KEPT_WHOLE_PLANS:
                vacant = next(filter(self._is_vacant, self._whole), None)
                if vacant is None:
                    return False
                del self._whole[vacant]
            whole = self._host.bind(drawing.plan)
        for kind in drawing.kinds:  # company may come, and OpenVINO forgets programs of sizes that no plan has
            self._plan(kind, drawing.batch)
        drawing.move_into(whole)
        self._whole[layout] = whole, weakref.ref(drawing)
        return True

    def _is_vacant(self, layout: Layout) -> bool:
        """Whether nobody lives in the whole plan of a layout."""
        whole, last = self._whole[layout]
        tenant = last()
        return tenant is None or tenant.whole is not whole

    def _plan(self, kind: Kind, pictures: int) -> _StepPlan:
        key = kind, pictures
        if key not in self._plans:
            while len(self._plans) >= _KEPT_PLANS:
                self._plans.popitem(last=False)[1].bound.close()
            while True:
                try:
                    self._plans[key] = self._bind(kind, pictures)
                    break
                except DeviceMemoryError:
                    if not self._plans:
                        raise
                    self._plans.popitem(last=False)[1].bound.close()
        self._plans.move_to_end(key)
        return self._plans[key]

    def _bind(self, kind: Kind, batch: int) -> _StepPlan:
        layout = Layout(
            width=kind.width,
            height=kind.height,
            tokens=kind.tokens,
            images=kind.images,
            batch=batch,
            draws=True,
            steps=(kind.step,),
        )
        plan = plan_denoising(self._manifest, layout)
        views = [
            (view, spec.shape[0])
            for call in plan.steps[0]
            for spec in self._manifest.program(call.program).inputs
            for view in (call.inputs[spec.name],)
        ]
        bound = self._executor.bind(plan, decodes=False)
        inputs = _gathered(plan, bound, views)
        pictures = np.arange(batch)
        for name, value in (
            ("rows", np.tile(pictures, layout.rows // batch)),
            (UNGUIDED, np.eye(batch, dtype=np.float32)),
        ):
            if name in bound.buffers:
                bound.buffers[name][...] = value
        if "conditional" in bound.buffers:
            bound.buffers["conditional"][pictures, layout.rows - batch + pictures] = 1
        return _StepPlan(
            bound=bound,
            batch=batch,
            inputs=inputs,
            changing=tuple(each for each in inputs if each.changes),
            placed={},
        )

    def _gather(self, plan: _StepPlan, drawing: Staged, first: int) -> None:
        """Writes a drawing's rows for its next step; those that are the same at every step only where they are new."""
        known = plan.placed.get(drawing.serial) == first
        batch, step = drawing.batch, drawing.step
        guided = drawing.drawing.layout.guided
        pictures = slice(first, first + batch)
        for each in plan.changing if known else plan.inputs:
            source = drawing.state(each.state) if each.state else drawing.buffers[each.source]
            target = each.target
            if source.ndim > target.ndim:
                source = source[step]
            if each.by_picture:
                target[pictures] = source
                continue
            conditional = source[batch:] if guided else source
            if len(target) == 2 * plan.batch:
                target[pictures] = source[:batch]
                target[plan.batch + first : plan.batch + first + batch] = conditional
            else:
                target[pictures] = conditional
        if drawing.drawing.layout.steps[step].guided:
            own = drawing.buffers["guidance"][step]
            guidance = plan.bound.buffers["guidance"][0]
            guidance[pictures, pictures] = own[:, :batch]
            guidance[pictures, plan.batch + first : plan.batch + first + batch] = own[:, batch:]


def _gathered(plan: Plan, bound: BoundPlan, views: Sequence[tuple[View, str | int]]) -> tuple[_Input, ...]:
    """The inputs of a plan of one step that have rows of drawings.

    Args:
        plan, bound: the plan, and its memory.
        views: what its programs read, and what the first axis of each counts.
    """
    inputs = set(plan.inputs()).difference(_OWN)
    found = {}
    for view, axis in views:
        if view.buffer in inputs:
            buffer, tabled = bound.buffers[view.buffer], view.step is not None
            kind = view.buffer.partition(".")[0]
            state = kind if kind in STATE else ""
            found[view.buffer] = _Input(
                source=view.buffer.removesuffix(HALF),
                target=buffer[0] if tabled else buffer,
                by_picture=axis == "batch",
                state=state,
                changes=tabled or bool(state),
            )
    return tuple(found.values())


def _clear_guidance(plan: _StepPlan) -> None:
    """No picture is guided by another's rows."""
    if "guidance" in plan.bound.buffers:
        plan.bound.buffers["guidance"][...] = 0


def _step_alone(drawing: Staged) -> None:
    """Takes a step in a plan of all of them, as a call of the pipeline does."""
    assert drawing.whole is not None
    drawing.whole.run_step(drawing.step)
    drawing.step += 1
    if drawing.done:
        check_finite(drawing.latents)
        drawing.move_out()
    # the model spreads what is not finite all over its picture, where it stays; between steps NumPy's own test is slow
    elif not all(map(math.isfinite, drawing.latents[:, 0, 0, 0].tolist())):
        raise NotFiniteError
