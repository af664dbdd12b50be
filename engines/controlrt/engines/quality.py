"""What a bundle's programs give up against the float32 export: both run on seeded inputs, each in what runs it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.compile import ProgramGraph
from controlrt.compiler.passes.channels_last import TO_FIRST, TO_LAST
from controlrt.compiler.passes.channels_last_residuals import ChannelsLastResiduals
from controlrt.compiler.passes.half_precision import PASSED_ON
from controlrt.compiler.reference import Feeds, Reference, entries, relative_error, rms_error
from controlrt.compiler.standard_form import standard_form
from controlrt.compiler.weights import WeightStore
from controlrt.engines.backends import BACKENDS
from controlrt.engines.parts import QUANTIZED, few_pictures
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BuildError
from controlrt.runtime.executors import Executor, HostExecutor, open_executor
from controlrt.runtime.manifest import Loss, Manifest, Program, TensorSpec
from controlrt.runtime.progress import Progress

_AXES = {"steps": "batch", "prompts": "rows", "entries": "rows"}
"""What an earlier stage's leading axis counts, when one step of a batch is all that is run."""


def measure_parts(
    built: Bundle, graphs: Iterable[ProgramGraph], exported: Manifest, progress: Progress
) -> tuple[Program, ...]:
    """The bundle's programs with the loss of the parts ``graphs``; what is to become an engine runs in ONNX Runtime.

    Raises:
        BuildError: a program whose output is not finite.
    """
    manifest, losses = built.manifest, {}
    residuals_last = any(isinstance(each, ChannelsLastResiduals) for each in BACKENDS[manifest.backend].passes)
    with measurable(built) as on_this_machine:
        for each in graphs:
            part = each.program.name
            progress.start(f"measure {part}")
            stages = [program for program in manifest.programs if program.part == part]
            if any(stage.precision in QUANTIZED for stage in stages):  # seeded noise is not what their scales are for
                continue
            with (
                Reference(few_pictures(exported, part)) as reference,
                open_executor(on_this_machine) as executor,
            ):
                loss = measure_loss(executor, stages, each.model, reference, residuals_last=residuals_last)
            if not math.isfinite(loss.max_relative_error):
                exact = manifest.precision == "fp32"
                mend = "its weights are damaged or too large" if exact else "build it with --precision fp32"
                raise BuildError(f"{part} gives values that are not finite in {manifest.precision}; {mend}")
            losses[part] = loss
    return tuple(
        msgspec.structs.replace(program, loss=losses.get(program.part, program.loss)) for program in manifest.programs
    )


@contextlib.contextmanager
def measurable(built: Bundle) -> Iterator[Bundle]:
    """The compiled programs as this machine can run them: as they are, or in ONNX Runtime on the CPU."""
    backend = BACKENDS[built.manifest.backend]
    if backend.ships_onnx and (backend.device == "cpu" or backend.runs_here()):
        yield built
        return
    on_the_cpu = msgspec.structs.replace(built.manifest, backend="onnxruntime")
    if not backend.ships_onnx:  # what becomes engines is ONNX that any machine runs
        yield Bundle(built.path, on_the_cpu)
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        (path / "programs").mkdir()
        with WeightStore(path / "programs") as weights:
            for program in built.manifest.programs:
                weights.save(standard_form(ir.load(built.path / program.file)), Path(program.file).name)
        yield Bundle(path, on_the_cpu)


def measure_loss(
    executor: Executor,
    programs: Sequence[Program],
    exported: ir.Model,
    reference: Reference,
    *,
    residuals_last: bool = False,
) -> Loss:
    """Runs an exported part in float32 and what it was compiled to.

    Args:
        executor: of the bundle.
        programs: the stages of one part, earlier ones first, or the part itself.
        exported: its graph before any pass.
        reference: where the export runs, and the sizes.
        residuals_last: whether the programs take and give residuals with channels last, as the export does not.

    Returns:
        The worst over the outputs.
    """
    feeds = reference.feeds(exported)
    expected = reference.run(exported, feeds)
    values = dict(feeds)
    for program in programs:
        given = entries(values) if program.stage == "prompt_timestep" else values
        if residuals_last:
            given = _residuals(given, TO_LAST)
        made = _run(executor, program, given, reference.dims)
        values |= _residuals(made, TO_FIRST) if residuals_last else made
    return Loss(
        max_relative_error=max(relative_error(values[name], expected[name]) for name in expected),
        rms_relative_error=max(rms_error(values[name], expected[name]) for name in expected),
    )


def _run(executor: Executor, program: Program, values: Mapping[str, NDArray[Any]], dims: Mapping[str, int]) -> Feeds:
    """As in the denoising loop: bound to memory of these sizes."""
    inputs = {spec.name: np.ascontiguousarray(values[spec.name], spec.dtype) for spec in program.inputs}
    if program.stage != "step" or not isinstance(executor, HostExecutor):
        return executor.run(program.name, inputs)
    outputs = {spec.name: np.zeros(_shape(spec, dims), spec.dtype) for spec in program.outputs}
    executor.bind_call(program.name, inputs, outputs)()
    return outputs


def _residuals(values: Mapping[str, NDArray[Any]], perm: tuple[int, ...]) -> Feeds:
    """The values, those that pass from program to program transposed."""
    return {
        name: array.transpose(perm) if name.startswith(PASSED_ON) and array.ndim == len(perm) else array
        for name, array in values.items()
    }


def _shape(spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else dims[_AXES.get(dim, dim)] for dim in spec.shape)
