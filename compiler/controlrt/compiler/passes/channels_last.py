"""Channels last: convolutions and group norms on (rows, height, width, channels), and nothing in between that swaps.

Tensor cores read a picture with its channels last; cuDNN transposes what comes otherwise, twice for every convolution.

Matches ``Conv`` on two sides with constant weights and ``GroupNormalization`` on pictures, or on their pixels in a row,
with the ``Sigmoid`` and ``Mul`` that make SiLU of it.

Gives ``com.microsoft.NhwcConv`` and ``com.microsoft.GroupNorm``, which read and write channels last, between two
``Transpose``; ``SinkTransposes`` then moves these through whatever lies between until they meet and cancel.

It is exact: both operators are defined as the same arithmetic on the transposed picture. The norm keeps its
statistics, scale and bias in float32, whatever the picture is: the ``normalization`` island of ``HalfPrecision``.

Saves cuDNN's transposes, and for a norm with SiLU five kernels of seven.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from controlrt.compiler.graph import constant, new_initializer, only_consumer, small_ints

DOMAIN = "com.microsoft"
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""``perm`` of the Transpose that puts channels last, and of the one that puts them back."""
MAX_GROUP = 512
"""Channels of a group at most: one block of threads sums a whole group."""


class ChannelsLast(ir.passes.InPlacePass):
    """Gives convolutions and group norms to CUDA's operators with channels last; see the module."""

    typed = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        made: dict[tuple[ir.Value, str], ir.Value] = {}
        found = False
        for node in tuple(model.graph):
            if node.domain:
                continue
            if node.op_type == "Conv":
                found |= _convolution(node, model.graph, made)
            elif node.op_type == "GroupNormalization":
                found |= _group_norm(node, model.graph, made)
        if found:
            model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, found)


def last(value: ir.Value) -> ir.Shape | None:
    """The shape of a picture with its channels last."""
    return None if value.shape is None else ir.Shape([value.shape[axis] for axis in TO_LAST])


def transpose(value: ir.Value, perm: tuple[int, ...], name: str) -> ir.Node:
    """A Transpose of ``value``."""
    node = ir.node("Transpose", [value], {"perm": perm}, name=f"{name}.Transpose")
    output = node.outputs[0]
    output.name, output.type = name, value.type
    output.shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in perm])
    return node


def _convolution(conv: ir.Node, graph: ir.Graph, made: dict[tuple[ir.Value, str], ir.Value]) -> bool:
    x, weight = conv.inputs[:2]
    tensor = constant(weight)
    if x is None or weight is None or tensor is None or x.shape is None or len(x.shape) != 4:
        return False
    if conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or conv.attributes.get_int("group", 1) != 1:
        return False
    if (weight, "last") not in made:
        made[weight, "last"] = new_initializer(graph, f"{weight.name}.last", _last(tensor))
    inputs = [made[weight, "last"], *conv.inputs[2:]]
    attributes = [a for name, a in conv.attributes.items() if name not in ("auto_pad", "group")]
    _surround(graph, conv, [conv], "NhwcConv", x, inputs, attributes)
    return True


def _group_norm(norm: ir.Node, graph: ir.Graph, made: dict[tuple[ir.Value, str], ir.Value]) -> bool:
    x, *affine = norm.inputs
    groups = norm.attributes.get_int("num_groups", 0)
    if x is None or x.shape is None or len(x.shape) not in (3, 4) or not groups:
        return False
    channels = x.shape[1]
    if not isinstance(channels, int) or channels % (2 * groups) or channels // groups > MAX_GROUP:
        return False  # a thread of the kernel takes two channels of a group
    tensors = [constant(value) for value in affine]
    if any(tensor is None for tensor in tensors):
        return False
    inputs = []
    for value, tensor in zip(affine, tensors, strict=True):
        assert value is not None
        assert tensor is not None
        if (value, "full") not in made:
            made[value, "full"] = new_initializer(graph, f"{value.name}.full", _full(tensor))
        inputs.append(made[value, "full"])
    if len(x.shape) == 3:
        norm = _of_a_column(norm, graph)
        x = norm.inputs[0]
        assert x is not None
    silu = _silu(norm.outputs[0])
    attributes = [
        ir.AttrInt64("groups", groups),
        ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 1e-5)),
        ir.AttrInt64("activation", int(silu is not None)),
        ir.AttrInt64("channels_last", 1),
    ]
    _surround(graph, norm, [*(silu or ()), norm], "GroupNorm", x, inputs, attributes)
    return True


def _of_a_column(norm: ir.Node, graph: ir.Graph) -> ir.Node:
    """The norm of (rows, channels, pixels), which VAEs have, as that of a picture of one column."""
    x, y = norm.inputs[0], norm.outputs[0]
    assert x is not None
    assert x.shape is not None
    axes = small_ints(graph, 3)
    column = ir.node("Unsqueeze", [x, axes], name=f"{y.name}.Unsqueeze")
    picture = ir.node(norm.op_type, [*column.outputs, *norm.inputs[1:]], dict(norm.attributes), name=norm.name)
    line = ir.node("Squeeze", [*picture.outputs, axes], name=f"{y.name}.Squeeze")
    for node, name in ((column, f"{y.name}.read"), (picture, f"{y.name}.column")):
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, x.type, ir.Shape([*x.shape, 1])
    line.outputs[0].name, line.outputs[0].type, line.outputs[0].shape = y.name, y.type, y.shape
    ir.convenience.replace_nodes_and_values(graph, norm, [norm], [column, picture, line], [y], line.outputs)
    return picture


def _silu(value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
    """The Mul and the Sigmoid behind ``value``, where they are x * sigmoid(x) and all that reads it."""
    users = tuple(value.consumers())
    if value.is_graph_output() or len(users) != 2 or len(tuple(value.uses())) != 2:
        return None
    sigmoid = next((node for node in users if node.op_type == "Sigmoid"), None)
    product = next((node for node in users if node.op_type == "Mul"), None)
    if sigmoid is None or product is None or only_consumer(sigmoid.outputs[0]) is not product:
        return None
    return product, sigmoid


def _surround(
    graph: ir.Graph,
    at: ir.Node,
    old: list[ir.Node],
    op_type: str,
    x: ir.Value,
    inputs: Sequence[ir.Value | None],
    attributes: Sequence[ir.Attr],
) -> None:
    """Puts an operator between two Transposes in place of ``old``, the first of which gives the result."""
    y = old[0].outputs[0]
    before = transpose(x, TO_LAST, f"{y.name}.in")
    node = ir.Node(DOMAIN, op_type, [before.outputs[0], *inputs], attributes, name=f"{y.name}.{op_type}")
    result = node.outputs[0]
    result.name, result.type, result.shape = f"{y.name}.last", y.type, last(y)
    after = transpose(result, TO_FIRST, y.name or "")
    ir.convenience.replace_nodes_and_values(graph, at, old, [before, node, after], [y], after.outputs)


def _last(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Weights (out, in, height, width) as (out, height, width, in)."""
    shape = ir.Shape([tensor.shape.numpy()[axis] for axis in TO_LAST])

    def transposed() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(TO_LAST)), tensor.dtype)

    return ir.LazyTensor(transposed, dtype=tensor.dtype, shape=shape)


def _full(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def widened() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32))

    return ir.LazyTensor(widened, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()))
