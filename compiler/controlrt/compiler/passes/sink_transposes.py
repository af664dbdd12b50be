"""Transposes that put channels first again sink through what does not care, until they meet their opposites.

Matches ``Transpose`` to channels first, as ``ChannelsLast`` and the export of attention blocks leave them, above
elementwise operators, ``Concat``, ``Gather`` of pictures, ``Resize`` and ``DepthToSpace``, where below them, through
more of the same, something transposes to channels last again.

Gives the same operators on pictures with channels last. A ``Transpose`` that finds its opposite goes, with it.

It is exact: elements move together or not at all.

Saves nearly all transposes of a step: what is left is at its inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.graph import constant, new_initializer, small_ints
from controlrt.compiler.passes.channels_last import TO_FIRST, TO_LAST, last, transpose

ELEMENTWISE = frozenset(("Add", "Cast", "Div", "Gelu", "Identity", "Mul", "Neg", "Relu", "Sigmoid", "Sub", "Tanh"))
_NEW_AXIS = {0: 0, 1: 3, 2: 1, 3: 2}
"""Where an axis of a picture is once channels are last."""


class SinkTransposes(ir.passes.InPlacePass):
    """Moves Transposes down until they cancel; see the module. The graph is in topological order."""

    typed = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        sinking = _Sinking(model.graph)
        for node in tuple(model.graph):
            sinking.visit(node)
        if sinking.changed:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, sinking.changed)


class _Sinking:
    """One walk. ``_lasts`` has, for values with channels first, the same picture with channels last."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._lasts: dict[ir.Value, ir.Value] = {}
        self._wanted = _wanted(graph)
        self.changed = False

    def visit(self, node: ir.Node) -> None:
        source = node.inputs[0] if node.inputs else None
        if _is_transpose(node, TO_FIRST) and source is not None:
            self._lasts[node.outputs[0]] = source
        elif _is_transpose(node, TO_LAST) and source in self._lasts:
            self._cancel(node.outputs[0], self._lasts[source])
        elif _is_transpose(node, TO_LAST) and source is not None:
            self._lasts[source] = node.outputs[0]
        elif node.outputs[0] in self._wanted and any(value in self._lasts for value in node.inputs if value):
            self._sink(node)

    def _cancel(self, twice: ir.Value, once: ir.Value) -> None:
        """Puts ``once`` in place of its picture transposed to and fro."""
        if twice.is_graph_output():
            if once.is_graph_output() or once.is_graph_input():
                return
            name, twice.name = twice.name, f"{twice.name}.twice"
            once.name = name
            once.metadata_props.update(twice.metadata_props)
            self._graph.outputs[list(self._graph.outputs).index(twice)] = once
        twice.replace_all_uses_with(once)
        self.changed = True

    def _sink(self, node: ir.Node) -> None:
        new = _SINKABLE[node.op_type](self, node) if node.op_type in _SINKABLE else self._elementwise(node)
        if new is None:
            return
        y, result = node.outputs[0], new[-1].outputs[0]
        result.name, result.type, result.shape = f"{y.name}.last", y.type, last(y)
        after = transpose(result, TO_FIRST, y.name or "")
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], [*new, after], [y], after.outputs)
        self._lasts[after.outputs[0]] = result
        self.changed = True

    def _elementwise(self, node: ir.Node) -> list[ir.Node] | None:
        """The same operator on operands with channels last; those of fewer dimensions have to be of one element."""
        operands = []
        for value in node.inputs:
            operand = self._last(value)
            if operand is None:
                return None
            operands.append(operand)
        return [ir.node(node.op_type, operands, dict(node.attributes), name=f"{node.outputs[0].name}.last")]

    def _concat(self, node: ir.Node) -> list[ir.Node] | None:
        new = self._elementwise(node)
        if new is not None:
            new[0].attributes["axis"] = ir.AttrInt64("axis", _NEW_AXIS[node.attributes["axis"].as_int() % 4])
        return new

    def _gather(self, node: ir.Node) -> list[ir.Node] | None:
        """Of whole pictures alone."""
        picture, index = node.inputs
        if picture is None or index is None or index.shape is None or len(index.shape) != 1:
            return None
        operand = self._last(picture)
        if operand is None or node.attributes.get_int("axis", 0) != 0:
            return None
        return [ir.node("Gather", [operand, index], {"axis": 0}, name=f"{node.outputs[0].name}.last")]

    def _resize(self, node: ir.Node) -> list[ir.Node] | None:
        """Whose scales or sizes are constants for every axis."""
        picture = self._last(node.inputs[0])
        operands: list[ir.Value | None] = [picture]
        if (
            picture is None
            or "axes" in node.attributes
            or (len(node.inputs) > 1 and node.inputs[1] is not None and _some(node.inputs[1]))
        ):
            return None
        for value in node.inputs[1:]:
            tensor = constant(value)
            if value is None or (tensor is not None and tensor.size == 0):
                operands.append(None)
            elif tensor is None or tensor.size != 4:
                return None
            else:
                permuted = ir.tensor(tensor.numpy()[list(TO_LAST)])
                operands.append(new_initializer(self._graph, f"{value.name}.last", permuted))
        return [ir.node("Resize", operands, dict(node.attributes), name=f"{node.outputs[0].name}.last")]

    def _depth_to_space(self, node: ir.Node) -> list[ir.Node] | None:
        """Channels are (row, column, channel) of a block: with channels last, its rows move before the columns."""
        x, block = node.inputs[0], node.attributes["blocksize"].as_int()
        shape = node.outputs[0].shape
        last = self._last(x)
        if x is None or last is None or shape is None or node.attributes.get_string("mode", "DCR") != "DCR":
            return None
        _, channels, height, width = shape
        if not isinstance(channels, int) or not isinstance(height, int) or not isinstance(width, int):
            return None
        name = f"{node.outputs[0].name}.last"
        blocks = ir.node("Reshape", [last, small_ints(self._graph, 0, 0, 0, block, block, channels)])
        rows = ir.node("Transpose", blocks.outputs, {"perm": (0, 1, 3, 2, 4, 5)})
        picture = ir.node("Reshape", [rows.outputs[0], small_ints(self._graph, 0, height, width, channels)], name=name)
        for inner, suffix in ((blocks, "blocks"), (rows, "rows")):
            inner.outputs[0].name, inner.outputs[0].type = f"{name}.{suffix}", x.type
        return [blocks, rows, picture]

    def _last(self, value: ir.Value | None) -> ir.Value | None:
        """``value`` with channels last, transposed if need be; None where it is no picture."""
        if value is None or value.shape is None:
            return None
        if all(dim == 1 for dim in value.shape) and len(value.shape) <= 4:
            return value
        if len(value.shape) != 4:
            return None
        if value not in self._lasts:
            tensor = constant(value)
            if tensor is not None:
                array = np.ascontiguousarray(tensor.numpy().transpose(TO_LAST))
                self._lasts[value] = new_initializer(self._graph, f"{value.name}.last", ir.tensor(array, tensor.dtype))
            else:
                before = self._moved(value) or transpose(value, TO_LAST, f"{value.name}.last")
                producer = value.producer()
                if producer is not None:
                    producer.append(before)
                else:
                    next(iter(self._graph)).prepend(before)
                self._lasts[value] = before.outputs[0]
        return self._lasts[value]

    def _moved(self, value: ir.Value) -> ir.Node | None:
        """A Reshape of a picture with one channel, or of one pixel: nothing moves but the name of an axis."""
        assert value.shape is not None
        _, channels, height, width = value.shape
        if not isinstance(channels, int) or not isinstance(height, int) or not isinstance(width, int):
            return None
        if channels != 1 and (height, width) != (1, 1):
            return None
        name = f"{value.name}.last"
        node = ir.node("Reshape", [value, small_ints(self._graph, 0, height, width, channels)], name=f"{name}.Reshape")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, last(value)
        return node


_SINKABLE: dict[str, Callable[[_Sinking, ir.Node], list[ir.Node] | None]] = {
    "Concat": _Sinking._concat,
    "Gather": _Sinking._gather,
    "Resize": _Sinking._resize,
    "DepthToSpace": _Sinking._depth_to_space,
}


def _wanted(graph: ir.Graph) -> set[ir.Value]:
    """Values that are transposed to channels last, at once or after more that a Transpose can sink through."""
    wanted: set[ir.Value] = set()
    for node in reversed(tuple(graph)):
        output = node.outputs[0]
        if _is_transpose(node, TO_LAST) or (output in wanted and not node.domain and _sinkable(node)):
            wanted.update(value for value in node.inputs[:1] if value is not None)
            if node.op_type in ELEMENTWISE or node.op_type == "Concat":
                wanted.update(value for value in node.inputs if value is not None)
    return {value for value in wanted if (n := value.producer()) is not None and not n.domain and _sinkable(n)}


def _sinkable(node: ir.Node) -> bool:
    return len(node.outputs) == 1 and (node.op_type in ELEMENTWISE or node.op_type in _SINKABLE)


def _is_transpose(node: ir.Node, perm: tuple[int, ...]) -> bool:
    return node.op_type == "Transpose" and not node.domain and tuple(node.attributes.get_ints("perm", ())) == perm


def _some(value: ir.Value) -> bool:
    tensor = constant(value)
    return tensor is None or tensor.size > 0
