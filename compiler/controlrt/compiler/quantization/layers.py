"""The layers of a graph that can be computed in int8: products of a value with constant weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from controlrt.compiler.graph import constant

_DERIVED = re.compile(r"(\.(half_[01]|half|[01][01]|matrix|last|smooth))+$")
"""What passes put after the name of weights that they make of others; the layer's input stays the same."""
_CHANNELS_AXIS = {"Conv": 1, "MatMul": -1, "Gemm": -1}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution or linear layer."""

    name: str
    """Of its weights as exported, such as ``unet.mid_block.resnets.0.conv1``: the same whatever passes ran."""
    node: ir.Node
    input: ir.Value
    weight: ir.Value
    output_axis: int
    """Of the weights: the output channels, each of which has a scale of its own."""
    input_axis: int
    """Of the weights: the input channels."""
    channels_axis: int
    """Of the input: its channels."""


def layers_of(graph: ir.Graph) -> list[Layer]:
    """All layers of ``graph``, in its order."""
    return [layer for node in graph if (layer := layer_of(node)) is not None]


def layer_of(node: ir.Node) -> Layer | None:
    """What ``node`` is as a layer; None where its weights are no constant floating point matrix or kernel."""
    if node.domain or node.op_type not in _CHANNELS_AXIS or node.inputs[0] is None or node.inputs[1] is None:
        return None
    weight = node.inputs[1]
    tensor = constant(weight)
    if tensor is None or not tensor.dtype.is_floating_point() or weight.name is None:
        return None
    rank = len(tensor.shape)
    if node.op_type == "Conv":
        if node.attributes.get_int("group", 1) != 1:
            return None
        output_axis, input_axis = 0, 1
    elif rank != 2 or node.attributes.get_int("transA", 0) != 0:
        return None
    else:
        output_axis, input_axis = (0, 1) if node.attributes.get_int("transB", 0) != 0 else (1, 0)
    return Layer(
        name=layer_name(weight.name),
        node=node,
        input=node.inputs[0],
        weight=weight,
        output_axis=output_axis,
        input_axis=input_axis,
        channels_axis=_CHANNELS_AXIS[node.op_type],
    )


def layer_name(weight: str) -> str:
    """The layer that weights of this name belong to: without what passes put after it, and without ``.weight``."""
    return _DERIVED.sub("", weight).removesuffix(".weight")
