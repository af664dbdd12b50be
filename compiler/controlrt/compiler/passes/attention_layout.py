"""Attention on (rows, tokens, channels): the splitting into heads goes into the operator.

Matches ``Attention`` (opset 23) whose query, key and value each come from ``Reshape`` to (rows, tokens, heads, width)
and ``Transpose`` to (rows, heads, tokens, width), and whose result goes back through ``Transpose`` and ``Reshape``
alone.

Gives the same ``Attention`` on the three-dimensional values, with ``q_num_heads`` and ``kv_num_heads`` as attributes.

It is exact: the operator defines its three-dimensional form as these reshapes and transposes.

Saves eight nodes per attention; a runtime that knows the layout reads each head where it lies.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.graph import only_consumer

_SWAP = (0, 2, 1, 3)


class AttentionLayout(ir.passes.InPlacePass):
    """Gives Attention its operands before they are split into heads; see the module."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        found = [_rewrite(node) for node in tuple(model.graph) if node.op_type == "Attention" and not node.domain]
        if any(found):
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, any(found))


def _rewrite(attention: ir.Node) -> bool:
    operands = [_before_heads(value) for value in attention.inputs[:3]]
    result = _after_heads(attention.outputs[0])
    query, key, value = operands if len(operands) == 3 else (None, None, None)
    if query is None or key is None or value is None or result is None or key[1] != value[1]:
        return False
    if any(operand is not None for operand in attention.inputs[3:]) or any(v.uses() for v in attention.outputs[1:]):
        return False
    for position, (source, _) in enumerate((query, key, value)):
        attention.replace_input_with(position, source)
    attention.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", query[1])
    attention.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", key[1])
    attention.outputs[0].shape = result.shape
    result.replace_all_uses_with(attention.outputs[0])
    return True


def _before_heads(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The value (rows, tokens, channels) that was split into heads to give ``value``, and the number of heads."""
    transpose = _transpose(value)
    reshape = transpose.inputs[0].producer() if transpose is not None and transpose.inputs[0] is not None else None
    if value is None or reshape is None or reshape.op_type != "Reshape":
        return None
    source = reshape.inputs[0]
    if source is None or source.shape is None or value.shape is None or len(source.shape) != 3 or len(value.shape) != 4:
        return None
    rows, heads, tokens, width = value.shape
    if not isinstance(heads, int) or not isinstance(width, int) or list(source.shape) != [rows, tokens, heads * width]:
        return None
    return source, heads


def _after_heads(value: ir.Value) -> ir.Value | None:
    """The value (rows, tokens, channels) that ``value`` (rows, heads, tokens, width) is joined to, and only to it."""
    transpose = only_consumer(value)
    if transpose is None or _transpose(transpose.outputs[0]) is None:
        return None
    reshape = only_consumer(transpose.outputs[0])
    if reshape is None or reshape.op_type != "Reshape" or reshape.outputs[0].is_graph_output():
        return None
    joined, split = reshape.outputs[0].shape, value.shape
    if joined is None or split is None or len(joined) != 3 or len(split) != 4:
        return None
    rows, heads, tokens, width = split
    if not isinstance(heads, int) or not isinstance(width, int) or list(joined) != [rows, tokens, heads * width]:
        return None
    return reshape.outputs[0]


def _transpose(value: ir.Value | None) -> ir.Node | None:
    """The Transpose of heads and tokens that gives ``value``."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", ())) != _SWAP:
        return None
    return node
