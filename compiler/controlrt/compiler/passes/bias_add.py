"""Bias and residual of a matrix product added at once.

Matches ``Add`` of a picture or of tokens to the sum of a ``MatMul`` and a constant (channels,), where nothing else
reads that sum and the channels are as many as the operator knows.

Gives ``com.microsoft.BiasAdd`` on (rows, tokens, channels), between two ``Reshape`` for pictures with channels last.

It is exact, but for the order of the additions.

Saves a kernel, and writing and reading the sum.
"""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.graph import small_ints
from controlrt.compiler.passes.biases import split_bias

DOMAIN = "com.microsoft"
CHANNELS = (320, 640, 1280)
"""Those of Stable Diffusion are the only ones the operator takes."""


class BiasAdd(ir.passes.InPlacePass):
    """Adds biases with residuals; see the module. What a norm can add comes first: ``SkipGroupNorm``."""

    typed = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        nodes = [node for node in tuple(model.graph) if node.op_type == "Add" and not node.domain]
        found = [_rewrite(node, model.graph) for node in nodes]
        if any(found):
            model.graph.opset_imports[DOMAIN] = 1
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, any(found))


def _rewrite(add: ir.Node, graph: ir.Graph) -> bool:
    y = add.outputs[0]
    shape = y.shape
    if shape is None or len(shape) not in (3, 4) or shape[-1] not in CHANNELS or len(add.inputs) != 2:
        return False
    for value, skip in (add.inputs, add.inputs[::-1]):
        if value is None or skip is None or value is skip or value.shape is None or skip.shape is None:
            return False
        if list(value.shape) != list(shape) or list(skip.shape) != list(shape):
            return False
        product, bias = split_bias(value, add)
        if bias is not None and product is not value:
            return _replace(add, product, bias, skip, graph)
    return False


def _replace(add: ir.Node, product: ir.Value, bias: ir.Value, skip: ir.Value, graph: ir.Graph) -> bool:
    y = add.outputs[0]
    assert y.shape is not None
    rows, *sides, channels = y.shape
    if any(not isinstance(side, int) for side in sides):
        return False
    name, pixels = f"{y.name}.BiasAdd", math.prod(int(str(side)) for side in sides)
    new: list[ir.Node] = []

    def reshaped(value: ir.Value, target: tuple[int, ...], named: str | None) -> ir.Value:
        node = ir.node("Reshape", [value, small_ints(graph, *target)], name=f"{named}.Reshape")
        node.outputs[0].name, node.outputs[0].type = named, y.type
        new.append(node)
        return node.outputs[0]

    flat = [product, skip]
    if len(sides) == 2:
        flat = [
            reshaped(value, (0, pixels, int(str(channels))), f"{name}.{which}")
            for value, which in zip(flat, ("x", "skip"), strict=True)
        ]
        for value in flat:
            value.shape = ir.Shape([rows, pixels, channels])
    node = ir.Node(DOMAIN, "BiasAdd", [flat[0], bias, flat[1]], name=name)
    new.append(node)
    result = node.outputs[0]
    result.name, result.type, result.shape = y.name, y.type, y.shape
    if len(sides) == 2:
        result.name, result.shape = f"{name}.tokens", ir.Shape([rows, pixels, channels])
        result = reshaped(result, (0, *(int(str(side)) for side in sides), int(str(channels))), y.name)
        result.shape = y.shape
    ir.convenience.replace_nodes_and_values(graph, add, [add], new, [y], [result])
    return True
