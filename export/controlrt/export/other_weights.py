"""A graph that was traced before, with other weights: quicker than a trace, and checked against PyTorch as one is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, nn

from controlrt.export.programs import ProgramSpec
from controlrt.export.trace import MAX_RELATIVE_ERROR, relative_error
from controlrt.runtime.manifest import Program
from controlrt.runtime.profile import ShapeProfile


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that a graph gives them."""
    own = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return dict(itertools.chain(*own))


def write_with_weights(
    spec: ProgramSpec,
    profile: ShapeProfile,
    traced: Program,
    file: Path,
    before: Mapping[str, str],
    now: Mapping[str, str],
    directory: Path,
) -> Program | None:
    """Writes ``file`` with the weights of ``spec`` into ``directory``, where ``export_program`` would.

    Args:
        spec: what would be traced; all but values of tensors is as it was when ``file`` was traced.
        profile: what sizes it is for.
        traced: the manifest entry of ``file``.
        file: the graph, weights beside it.
        before, now: digests of its tensors by name, then and now.
        directory: where it goes.

    Returns:
        Its manifest entry; None where the graph does not hold every tensor that changed as its own weight, or does not
        give what PyTorch gives.
    """
    started = time.monotonic()
    changed = {name for name, digest in now.items() if before.get(name) != digest}
    model = ir.load(file)
    held = model.graph.initializers
    merged = {digest for name, digest in before.items() if name not in held}  # equal tensors are one in a graph
    if before.keys() != now.keys() or any(name not in held or before[name] in merged for name in changed):
        return None
    tensors = named_tensors(spec.module)
    for name in sorted(changed):
        array = _as_held(held[name], tensors[name])
        if array is None:
            return None
        held[name].const_value = ir.tensor(array, name=name)
    target = directory / file.name
    ir.save(model, target, external_data=f"{file.name}.data")
    del model, held
    worst = relative_error(spec, profile, target)
    if not worst <= MAX_RELATIVE_ERROR:
        for written in (target, directory / f"{file.name}.data"):
            written.unlink(missing_ok=True)
        return None
    return msgspec.structs.replace(
        traced, max_relative_error=worst, export_seconds=round(time.monotonic() - started, 3)
    )


def _as_held(value: ir.Value, tensor: Tensor) -> NDArray[np.generic] | None:
    """The tensor as the graph has it: the exporter transposes matrices for ``MatMul``, which have no flag for it."""
    before = value.const_value
    if before is None:
        return None
    uses = {(use.node.op_type, use.idx) for use in value.uses()}
    transposed = tensor.dim() == 2 and uses == {("MatMul", 1)}
    array: NDArray[np.generic] = (tensor.T if transposed else tensor).detach().cpu().numpy()
    same = tuple(array.shape) == tuple(before.shape.numpy()) and array.dtype == before.dtype.numpy()
    return array if same else None
