"""What passes ask of a graph: constants, and shapes as far as they are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node; None for anything that is computed or fed."""
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def constant_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The elements of a constant tensor of integers of at most one dimension."""
    tensor = constant(value)
    if tensor is None or not tensor.dtype.is_integer() or len(tensor.shape) > 1:
        return None
    return tuple(int(element) for element in tensor.numpy().reshape(-1))


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that reads ``value``, if it alone does, at one place, and the value is no output of the graph."""
    uses = tuple(value.uses())
    return None if value.is_graph_output() or len(uses) != 1 else uses[0].node


def new_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer of ``graph`` holding ``tensor``; where ``name`` is taken a number is put after it."""
    free, number = name, 0
    while free in graph.initializers:
        number += 1
        free = f"{name}.{number}"
    tensor.name = free
    value = ir.val(free, tensor.dtype, tensor.shape.numpy(), const_value=tensor)
    graph.register_initializer(value)
    return value


def small_ints(graph: ir.Graph, *elements: int) -> ir.Value:
    """The initializer of ``graph`` that holds these int64 elements: one for all who ask."""
    return _once(graph, "_".join(["ints", *map(str, elements)]), np.array(elements, np.int64))


def small_number(graph: ir.Graph, number: float) -> ir.Value:
    """The initializer of ``graph`` that holds this float32 number: one for all who ask."""
    return _once(graph, f"number_{number}", np.array(number, np.float32))


def _once(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    found = graph.initializers.get(name)
    return new_initializer(graph, name, ir.tensor(array)) if found is None else found
