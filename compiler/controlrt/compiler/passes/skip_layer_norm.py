"""Sum and layer norm in one operator: a residual and a bias are added where the norm reads them.

Matches ``LayerNormalization`` over the last axis, with scale and bias, of an ``Add`` of two values (rows, tokens,
channels).

Gives ``com.microsoft.SkipLayerNormalization``, whose fourth output is the sum, for what else reads it. The bias of the
MatMul that makes an operand, where nothing else reads it, becomes the operator's own.

It is exact, but for the order of the additions.

Saves two kernels for each norm, and writing and reading the tokens as often.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.graph import constant
from controlrt.compiler.passes.biases import join_biases, split_bias

DOMAIN = "com.microsoft"


class SkipLayerNorm(ir.passes.InPlacePass):
    """Lets layer norms add what they normalize; see the module."""

    typed = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        norms = [n for n in tuple(model.graph) if n.op_type == "LayerNormalization" and not n.domain]
        found = [_rewrite(node, model.graph) for node in norms]
        if any(found):
            model.graph.opset_imports[DOMAIN] = 1
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, any(found))


def _rewrite(norm: ir.Node, graph: ir.Graph) -> bool:
    total, y = norm.inputs[0], norm.outputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or add.op_type != "Add" or add.domain or total.is_graph_output():
        return False
    shape = total.shape
    if shape is None or len(shape) != 3 or norm.attributes.get_int("axis", -1) not in (-1, 2) or len(norm.inputs) != 3:
        return False
    if any(v.uses() or v.is_graph_output() for v in norm.outputs[1:]) or any(
        constant(v) is None for v in norm.inputs[1:]
    ):
        return False
    operands = [value for value in add.inputs if value is not None and value.shape is not None]
    if len(operands) != 2 or operands[0] is operands[1] or any(list(v.shape or ()) != list(shape) for v in operands):
        return False
    parts = [split_bias(value, add) for value in operands]
    if parts[0][1] is None:
        parts.reverse()  # the one with a bias first: the other is the skip
    joined = join_biases(graph, [bias for _, bias in parts if bias is not None])
    summed = any(user is not norm for user in total.consumers())
    inputs = [parts[0][0], parts[1][0], *norm.inputs[1:3], *([joined] if joined is not None else [])]
    attributes = [ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 1e-5))]
    name = f"{y.name}.SkipLayerNormalization"
    node = ir.Node(DOMAIN, "SkipLayerNormalization", inputs, attributes, num_outputs=4 if summed else 1, name=name)
    new = [node.outputs[0], node.outputs[3]] if summed else [node.outputs[0]]
    for value, old in zip(new, (y, total), strict=False):
        value.name, value.type, value.shape = old.name, old.type, old.shape
    if summed:
        node.outputs[1].name = node.outputs[2].name = ""
    ir.convenience.replace_nodes_and_values(graph, add, [norm, add], [node], [y, total] if summed else [y], new)
    return True
