"""Half precision: float32 becomes float16 in the graph itself, but for the islands where that costs too much.

The graph comes out strongly typed, as TensorRT asks: every value has one type, and Cast nodes stand where types meet.
Weights are rounded once, when the model is written. Inputs and outputs keep float32, so callers see no difference, but
for those that go from program to program (residuals), which are float16 on both sides.

Four islands stay in float32; ``docs/precision.md`` has what each is worth:

* ``timestep``: what depends on the timestep and not on the latents, and what goes into nothing else, such as SDXL's
  sizes. A sinusoid's argument goes to 999, where float16 steps by a half. It runs once per schedule, so it costs
  nothing; the table that crosses into the step is float16.
* ``sampler``: everything after the model's output, and the scaling of the latents before its first weight. Errors there
  add up from step to step, and there is no weight in it, so it is cheap.
* ``normalization``: the statistics of GroupNormalization and LayerNormalization, means over up to a million elements.
  The operators have an attribute for it, ``stash_type``; what they read and write is float16.
* ``softmax``: exponentials and their sum, also inside Attention, whose attribute is ``softmax_precision``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from controlrt.compiler.binding import COPIES, dependencies
from controlrt.compiler.graph import constant, new_initializer

ISLANDS: Final = ("timestep", "sampler", "normalization", "softmax")
SAMPLER_INPUTS = frozenset(
    ("guidance", "conditional", "guidance_rescale", "history", "noise", "update", "clip", "mask", "known", "blend")
)
SCALE = "input_scale"
PASSED_ON = "residual_"
"""Inputs and outputs whose names begin so go from program to program and become float16 themselves."""

_FULL, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LIMIT = float(np.finfo(np.float16).max)
_STASHED = frozenset(("GroupNormalization", "LayerNormalization"))
_REDUCED = frozenset(("Softmax", "LogSoftmax"))


class HalfPrecision(ir.passes.InPlacePass):
    """Rewrites a float32 graph to float16; see the module.

    Args:
        labels: what each graph input stands for, as for ``binding.cut``.
        islands: those of ``ISLANDS`` that stay in float32.
    """

    def __init__(self, labels: Mapping[str, str], islands: Collection[str] = ISLANDS) -> None:
        super().__init__()
        self.labels, self.islands = labels, frozenset(islands)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``, which is in topological order and without subgraphs.

        Raises:
            ValueError: a node holds a subgraph.
        """
        graph = model.graph
        if any(attribute.type == ir.AttributeType.GRAPH for node in graph for attribute in node.attributes.values()):
            raise ValueError("a graph with control flow stays as it is")
        opset = graph.opset_imports.get("", 0)
        full = self._island(graph)
        typing = {node: _Typing(node, opset) for node in graph}
        full |= {node for node, types in typing.items() if not types.takes_half}
        casts = _Casts(graph)
        before = _types(graph)
        for value in graph.inputs:
            if value.dtype == _FULL and (value.name or "").startswith(PASSED_ON):
                value.type = ir.TensorType(_HALF)  # not its dtype: clones of a graph share the type
        for node in tuple(graph):
            _convert(node, typing[node], node not in full, casts, self.islands)
        for index, value in enumerate(graph.outputs):
            wanted = _HALF if (value.name or "").startswith(PASSED_ON) else _FULL
            if value.dtype in (_FULL, _HALF) and value.dtype != wanted:
                graph.outputs[index] = casts.of_output(value, wanted)
        return ir.passes.PassResult(model, _types(graph) != before)

    def _island(self, graph: ir.Graph) -> set[ir.Node]:
        """The nodes that stay in float32 for where they stand or for what they do."""
        found: set[ir.Node] = set()
        if "timestep" in self.islands:
            found |= _of_the_timestep(graph, self.labels)
        if "sampler" in self.islands:
            found |= _of_the_sampler(graph) | _scaling(graph)
        if "softmax" in self.islands:
            found |= {node for node in graph if node.op_type in _REDUCED}
        return found


def _of_the_timestep(graph: ir.Graph, labels: Mapping[str, str]) -> set[ir.Node]:
    depends = dependencies(graph, labels)
    early = {value for value, on in depends.items() if "timestep" in on and not on & {"step", "hint"}}
    found = {node for node in graph if early.intersection(node.outputs)}
    for node in reversed(graph):
        users = [user for output in node.outputs for user in output.consumers()]
        if users and found.issuperset(users):
            found.add(node)
    return _without_last_copies(graph, found)


def _of_the_sampler(graph: ir.Graph) -> set[ir.Node]:
    """Everything that depends on what only the sampler reads."""
    depends = dependencies(graph, dict.fromkeys(SAMPLER_INPUTS, "sampler"))
    return {node for node in graph if "sampler" in depends[node.outputs[0]]}


def _scaling(graph: ir.Graph) -> set[ir.Node]:
    """What brings the latents to the model's scale, before any weight."""
    raw, scaled = set(graph.inputs), {value for value in graph.inputs if value.name == SCALE}
    found: set[ir.Node] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if scaled.intersection(read) and all(value in raw or _is_small(value) for value in read):
            found.add(node)
            raw.update(node.outputs)
            scaled.update(node.outputs)
        elif all(value in raw or _is_small(value) for value in read):
            raw.update(node.outputs)
    return _without_last_copies(graph, found)


def _without_last_copies(graph: ir.Graph, island: set[ir.Node]) -> set[ir.Node]:
    """Without the nodes at its end that only copy: the smaller tensor is cast, and the copies are of float16."""
    for node in reversed(graph):
        if node in island and node.op_type in COPIES and not island.intersection(node.outputs[0].consumers()):
            island.remove(node)
    return island


def _is_small(value: ir.Value) -> bool:
    """Whether it is a constant that is no weight: a shape, an axis, a scalar."""
    tensor = constant(value)
    return tensor is not None and (tensor.size <= 1 or tensor.dtype.is_integer())


class _Typing:
    """Which inputs and outputs of a node may be float16, by its operator's schema."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.inputs: tuple[bool, ...] = ()
        self.outputs: tuple[bool, ...] = ()
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
        except onnx.defs.SchemaError:  # not a standard operator, so nothing is known of it
            self.takes_half = False
            return
        allowed = {each.type_param_str: "tensor(float16)" in each.allowed_type_strs for each in schema.type_constraints}
        self.inputs = tuple(allowed.get(kind, False) for kind in _kinds(schema.inputs, len(node.inputs)))
        self.outputs = tuple(allowed.get(kind, False) for kind in _kinds(schema.outputs, len(node.outputs)))
        # LayerNormalization's mean is float32 whatever it reads; only a first output decides
        self.takes_half = bool(self.outputs) and (self.outputs[0] or node.outputs[0].dtype != _FULL)


def _kinds(parameters: Iterable[onnx.defs.OpSchema.FormalParameter], count: int) -> list[str]:
    """The type of each of ``count`` arguments; the last parameter repeats where it is variadic."""
    kinds = [parameter.type_str for parameter in parameters]
    return [kinds[min(index, len(kinds) - 1)] for index in range(count)] if kinds else []


class _Casts:
    """Casts of values, each made once, right after what it casts; constants are rounded instead."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` as ``dtype``."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._made:
            tensor = constant(value)
            made = self._node(value, dtype) if tensor is None else self._rounded(value, tensor)
            self._made[value, dtype] = made
        return self._made[value, dtype]

    def of_output(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The same for a graph output, which keeps its name."""
        name = value.name
        cast = self.of(value, dtype)
        value.name, cast.name = f"{name}.{value.dtype}", name
        return cast

    def _node(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}.to_{dtype.name.lower()}")
        output = node.outputs[0]
        output.name, output.shape, output.type = node.name, value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is not None:
            producer.append(node)
        else:
            next(iter(self._graph)).prepend(node)
        return output

    def _rounded(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        def rounded() -> ir.TensorProtocol:
            return ir.tensor(tensor.numpy().clip(-_LIMIT, _LIMIT).astype(np.float16))

        lazy = ir.LazyTensor(rounded, dtype=_HALF, shape=ir.Shape(tensor.shape.numpy()))
        return new_initializer(self._graph, f"{value.name}.half", lazy)


def _convert(node: ir.Node, typing: _Typing, to_half: bool, casts: _Casts, islands: Collection[str]) -> None:
    """Gives one node its types, its inputs being typed already."""
    if node.op_type == "Cast":  # it reads any type; only what was an integer is made float16 at once
        source = node.inputs[0]
        if to_half and source is not None and source.dtype not in (_FULL, _HALF) and node.outputs[0].dtype == _FULL:
            node.attributes["to"] = ir.AttrInt64("to", _HALF)
            node.outputs[0].type = ir.TensorType(_HALF)
        return
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in (_FULL, _HALF):
            half = to_half and typing.inputs[index]
            node.replace_input_with(index, casts.of(value, _HALF if half else _FULL))
    if not to_half:
        return
    for output, may in zip(node.outputs, typing.outputs, strict=True):
        if may and output.dtype == _FULL:
            output.type = ir.TensorType(_HALF)
    if node.op_type in _STASHED:
        stash = _FULL if "normalization" in islands else _HALF
        node.attributes["stash_type"] = ir.AttrInt64("stash_type", stash)
    elif node.op_type == "Attention" and "softmax" in islands:
        node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", _FULL)
    elif node.op_type == "ConstantOfShape" and (fill := node.attributes.get_tensor("value", None)) is not None:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill.numpy().astype(np.float16)))


def _types(graph: ir.Graph) -> list[ir.DataType | None]:
    """Of all inputs, and of all that nodes give."""
    return [value.dtype for value in (*graph.inputs, *(output for node in graph for output in node.outputs))]
