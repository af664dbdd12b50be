"""What a bundle's programs give up against the float32 export: both run on seeded inputs, each in what runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.passes.channels_last import TO_FIRST, TO_LAST
from controlrt.compiler.passes.half_precision import PASSED_ON
from controlrt.compiler.reference import Feeds, Reference, entries, relative_error, rms_error
from controlrt.runtime.executors import Executor, HostExecutor
from controlrt.runtime.manifest import Loss, Program, TensorSpec

_AXES = {"steps": "batch", "prompts": "rows", "entries": "rows"}
"""What an earlier stage's leading axis counts, when one step of a batch is all that is run."""


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
