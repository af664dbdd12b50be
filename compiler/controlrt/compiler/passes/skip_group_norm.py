"""Sum and group norm in one operator: residual, timestep's embedding and bias are added where the norm reads them.

Matches ``com.microsoft.GroupNorm``, as ``ChannelsLast`` leaves it, of an ``Add`` of two pictures with channels last, or
of a picture and one value for each row and channel.

Gives ``com.microsoft.SkipGroupNorm``, whose second output is the sum, for what else reads it. Biases of the convolution
or MatMul that make the operands, where nothing else reads them, become the operator's own.

It is exact, but for the order of the additions.

Saves one or two kernels for each norm, and writing and reading the picture as often.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.graph import small_ints
from controlrt.compiler.passes.biases import drop_bias, join_biases, split_bias
from controlrt.compiler.passes.channels_last import DOMAIN


class SkipGroupNorm(ir.passes.InPlacePass):
    """Lets group norms add what they normalize; see the module."""

    typed = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        found = [_rewrite(node, model.graph) for node in tuple(model.graph) if node.op_type == "GroupNorm"]
        if any(found):
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, any(found))


def _rewrite(norm: ir.Node, graph: ir.Graph) -> bool:
    total, gamma, beta = norm.inputs
    add = total.producer() if total is not None else None
    if total is None or add is None or add.op_type != "Add" or add.domain or total.is_graph_output():
        return False
    pictures = [value for value in add.inputs if value is not None and _same_shape(value, total)]
    if not pictures or len(add.inputs) != 2:
        return False
    x = max(pictures, key=lambda value: split_bias(value, add)[1] is not None)
    other = add.inputs[1] if add.inputs[0] is x else add.inputs[0]
    if other is None or other is x:
        return False
    skip = other if _same_shape(other, total) else _per_row(other, total, add, graph)
    if skip is None:
        return False
    biases, operands = [], []
    for value in (x, skip):
        operand, bias = split_bias(value, add)
        if bias is not None:
            drop_bias(operand)
            biases.append(bias)
        operands.append(operand)
    summed = any(user is not norm for user in total.consumers())
    joined = join_biases(graph, biases)
    inputs = [operands[0], gamma, beta, operands[1], *([joined] if joined is not None else [])]
    attributes = list(norm.attributes.values())
    y = norm.outputs[0]
    node = ir.Node(DOMAIN, "SkipGroupNorm", inputs, attributes, num_outputs=1 + summed, name=f"{y.name}.SkipGroupNorm")
    for new, old in zip(node.outputs, (y, total), strict=False):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    old_values = [y, total] if summed else [y]
    ir.convenience.replace_nodes_and_values(graph, add, [norm, add], [node], old_values, node.outputs)
    return True


def _same_shape(value: ir.Value, like: ir.Value) -> bool:
    return value.shape is not None and like.shape is not None and list(value.shape) == list(like.shape)


def _per_row(value: ir.Value, total: ir.Value, at: ir.Node, graph: ir.Graph) -> ir.Value | None:
    """``value`` (rows, 1, 1, channels) as (rows, channels), taken from before it was given its sides."""
    shape, whole = value.shape, total.shape
    if shape is None or whole is None or list(shape) != [whole[0], 1, 1, whole[3]]:
        return None
    return _flat(value, at, graph)


def _flat(value: ir.Value, at: ir.Node, graph: ir.Graph) -> ir.Value:
    """``value``, which has one element for each row and channel, as (rows, channels)."""
    assert value.shape is not None
    plain = _row_and_channels(value.shape)
    if list(value.shape) == plain:
        return value
    node = value.producer()
    source = node.inputs[0] if node is not None and node.inputs and not node.domain else None
    if node is not None and source is not None and source.shape is not None:
        same = _row_and_channels(source.shape) == plain
        if same and node.op_type in ("Reshape", "Transpose", "Unsqueeze"):
            return _flat(source, at, graph)
        if _row_and_channels(source.shape)[1:] == plain[1:] and _is_expansion(node):
            flat = _flat(source, node, graph)
            gather = ir.node("Gather", [flat, node.inputs[1]], {"axis": 0}, name=f"{value.name}.flat")
            return _put(gather, value, plain, node)
    reshape = ir.node("Reshape", [value, small_ints(graph, 0, -1)], name=f"{value.name}.flat")
    return _put(reshape, value, plain, at)


def _row_and_channels(shape: ir.Shape) -> list[int | ir.SymbolicDim]:
    """The first dimension, and of the others those that are not 1."""
    rows, *others = shape
    return [rows, *(dim for dim in others if dim != 1)]


def _is_expansion(node: ir.Node) -> bool:
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0


def _put(node: ir.Node, like: ir.Value, shape: list[int | ir.SymbolicDim], at: ir.Node) -> ir.Value:
    output = node.outputs[0]
    output.name, output.type, output.shape = node.name, like.type, ir.Shape(shape)
    at.prepend(node)
    return output
