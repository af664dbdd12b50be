"""GEGLU after its projection as one operator: bias, split, GELU and product.

Matches ``Add`` of a constant (channels,) to a ``MatMul``, a ``Split`` of the last axis in two equal halves, the exact
``Gelu`` of the second and its product with the first, where the whole has one of the widths that the operator knows.

Gives ``com.microsoft.BiasSplitGelu``.

It is exact: the operator computes in float32 and rounds once.

Saves three kernels of four, and writing and reading the block's largest activation three times.
"""

from __future__ import annotations

import onnx_ir as ir

from controlrt.compiler.graph import constant_ints, only_consumer
from controlrt.compiler.passes.biases import product_and_bias

DOMAIN = "com.microsoft"
WIDTHS = (2560, 5120, 10240)
"""Of the projection: those of Stable Diffusion 1 and 2 and SDXL are the only ones the operator takes."""


class BiasSplitGelu(ir.passes.InPlacePass):
    """Lets one operator do what comes after a GEGLU's projection; see the module."""

    typed = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        found = [_rewrite(node, model.graph) for node in tuple(model.graph) if node.op_type == "Split"]
        if any(found):
            model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, any(found))


def _rewrite(split: ir.Node, graph: ir.Graph) -> bool:
    whole = split.inputs[0]
    add = whole.producer() if whole is not None else None
    if whole is None or add is None or add.op_type != "Add" or only_consumer(whole) is not split:
        return False
    if not _in_half(split, whole):
        return False
    value, gate = split.outputs
    gelu, product = only_consumer(gate), only_consumer(value)
    if gelu is None or product is None or gelu.op_type != "Gelu" or product.op_type != "Mul" or gelu.domain:
        return False
    if gelu.attributes.get_string("approximate", "none") != "none" or only_consumer(gelu.outputs[0]) is not product:
        return False
    found = product_and_bias(add)
    if found is None:
        return False
    y = product.outputs[0]
    node = ir.Node(DOMAIN, "BiasSplitGelu", found, name=f"{y.name}.BiasSplitGelu")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = y.name, y.type, y.shape
    ir.convenience.replace_nodes_and_values(graph, product, [product, gelu, split, add], [node], [y], node.outputs)
    return True


def _in_half(split: ir.Node, whole: ir.Value) -> bool:
    shape, axis = whole.shape, split.attributes.get_int("axis", 0)
    if shape is None or len(shape) != 3 or axis not in (-1, 2) or shape[2] not in WIDTHS or len(split.outputs) != 2:
        return False
    half = int(str(shape[2])) // 2
    return len(split.inputs) < 2 or constant_ints(split.inputs[1]) == (half, half)
