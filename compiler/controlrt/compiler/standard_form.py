"""Operators of ONNX Runtime's CUDA provider written in standard ones, by their definitions.

What a pass gives to the provider can then be run anywhere, to compare it with what it was made of, and its
multiplications can be counted. Only what the passes here put in has a rule.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "com.microsoft"
_FIRST, _LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def standard_form(model: ir.Model) -> ir.Model:
    """``model`` or a copy of it without what only CUDA has; ``MultiHeadAttention`` stays, the CPU has it too."""
    if not any(_has_rule(node) for node in model.graph):
        return model
    copy = model.clone()
    for node in tuple(copy.graph):
        if _has_rule(node):
            _Writer(copy.graph, node).write()
    RemoveUnusedNodesPass()(copy)
    return copy


def _has_rule(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in _RULES


class _Writer:
    """Writes one operator out."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.tape = graph, node, ir.tape.Tape()
        self.attributes = node.attributes
        self._constants: list[ir.Value] = []

    def write(self) -> None:
        results = _RULES[self.node.op_type](self)
        old = [value for value in self.node.outputs if value.name or value.uses()]
        made = [value for node in self.tape.nodes for value in node.outputs]
        for number, value in enumerate(made):
            value.name = f"{self.node.outputs[0].name}.standard.{number}"
        for new, value in zip(results, old, strict=True):
            new.name, new.type, new.shape = value.name, value.type, value.shape
        nodes = list(self.tape.nodes)
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], nodes, old, results)

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def read(self, index: int) -> ir.Value:
        value = self.input(index)
        if value is None:
            raise ValueError(f"{self.node.op_type} {self.node.name!r} lacks input {index}")
        return value

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        return self.tape.op(op_type, inputs, attributes)

    def ints(self, *values: int) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.array(values, np.int64)))

    def full(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=ir.DataType.FLOAT)

    def like(self, value: ir.Value, model: ir.Value) -> ir.Value:
        return self.op("CastLike", value, model)

    def total(self, x: ir.Value, *others: ir.Value | None) -> ir.Value:
        for other in others:
            if other is not None:
                x = self.op("Add", x, other)
        return x


def _nhwc_conv(w: _Writer) -> list[ir.Value]:
    """Conv of the picture and the kernels with channels last."""
    x, kernel = w.op("Transpose", w.read(0), perm=_FIRST), w.op("Transpose", w.read(1), perm=_FIRST)
    attributes = {name: a.value for name, a in w.attributes.items()}
    bias = w.input(2)
    y = w.op("Conv", x, kernel, *([bias] if bias is not None else []), **attributes)
    return [w.op("Transpose", y, perm=_LAST)]


def _group_norm(w: _Writer) -> list[ir.Value]:
    return [_normalized(w, w.read(0))]


def _skip_group_norm(w: _Writer) -> list[ir.Value]:
    """The skip may be one value for each row and channel: (rows, channels) or (rows, 1, 1, channels)."""
    x, skip = w.read(0), w.read(3)
    if skip.shape is None:
        raise ValueError(f"{w.node.name!r}: nothing is known of its skip")
    if len(skip.shape) == 2:
        skip = w.op("Unsqueeze", skip, w.ints(1, 2))
    total = w.total(x, skip, w.input(4))
    y = _normalized(w, total)
    return [y, total] if len(w.node.outputs) > 1 else [y]


def _normalized(w: _Writer, x: ir.Value) -> ir.Value:
    """In float32, whatever ``x`` is; inputs 1 and 2 are scale and bias."""
    groups = w.attributes["groups"].as_int()
    first = w.op("Transpose", w.full(x), perm=_FIRST)
    if (shape := w.node.outputs[0].shape) is not None:
        first.shape = ir.Shape([shape[axis] for axis in _FIRST])
    y = w.op(
        "GroupNormalization",
        *(first, w.read(1), w.read(2)),
        num_groups=groups,
        epsilon=w.attributes["epsilon"].as_float(),
    )
    if w.attributes["activation"].as_int():
        y = w.op("Mul", y, w.op("Sigmoid", y))
    return w.like(w.op("Transpose", y, perm=_LAST), x)


def _skip_layer_normalization(w: _Writer) -> list[ir.Value]:
    total = w.total(w.read(0), w.read(1), w.input(4))
    y = w.op("LayerNormalization", total, w.read(2), w.read(3), axis=-1, epsilon=w.attributes["epsilon"].as_float())
    return [y, total] if len(w.node.outputs) > 3 else [y]


def _bias_split_gelu(w: _Writer) -> list[ir.Value]:
    whole = w.full(w.total(w.read(0), w.read(1)))
    value, gate = w.tape.op_multi_out("Split", [whole], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    return [w.like(w.op("Mul", value, w.op("Gelu", gate)), w.read(0))]


def _bias_add(w: _Writer) -> list[ir.Value]:
    return [w.total(w.read(0), w.read(1), w.read(2))]


_RULES: dict[str, Callable[[_Writer], list[ir.Value]]] = {
    "NhwcConv": _nhwc_conv,
    "GroupNorm": _group_norm,
    "SkipGroupNorm": _skip_group_norm,
    "SkipLayerNormalization": _skip_layer_normalization,
    "BiasSplitGelu": _bias_split_gelu,
    "BiasAdd": _bias_add,
}
CUDA_ONLY = tuple(_RULES)
"""What has a rule."""
