"""Stores float32 weights in float16 and reads them back in float32: half the bytes, and the same arithmetic.

In a bundle in int8 what is not in int8 would be most of its bytes. Rounding a weight to float16 costs a relative error
of up to 2^-11, far less than int8 costs. Weights that float16 cannot hold stay as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from controlrt.compiler.graph import new_initializer

MIN_ELEMENTS = 1024
"""Smaller ones save nothing."""
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).tiny)
"""Of the numbers that float16 has at full precision."""


class HalfWeights(ir.passes.InPlacePass):
    """See the module."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        graph = model.graph
        found = [
            value for value in tuple(graph.initializers.values()) if _is_large(value) and not value.is_graph_output()
        ]
        for value in found:
            _store_in_half(graph, value)
        return ir.passes.PassResult(model, bool(found))


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_ELEMENTS or not value.uses():
        return False
    largest = float(np.abs(tensor.numpy()).max(initial=0.0))
    return _SMALLEST <= largest <= _LARGEST


def _store_in_half(graph: ir.Graph, value: ir.Value) -> None:
    tensor = value.const_value
    assert tensor is not None  # it is large
    shape = tensor.shape.numpy()

    def half() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float16))

    lazy = ir.LazyTensor(half, dtype=ir.DataType.FLOAT16, shape=ir.Shape(shape))
    stored = new_initializer(graph, f"{value.name}.half", lazy)
    cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{value.name}.full")
    output = cast.outputs[0]
    output.name, output.shape, output.type = f"{value.name}.full", ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    value.replace_all_uses_with(output)
    next(iter(graph)).prepend(cast)
    graph.initializers.pop(value.name or "")
