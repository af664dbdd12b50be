"""Binding times: cuts one step's graph into programs by what each value depends on.

Whatever does not depend on the latents does not belong in the denoising loop. For every value the set of graph inputs
it depends on is computed, and with it the earliest stage at which it can be known:

| stage | depends on | runs |
|---|---|---|
| ``timestep`` | the timestep | once per schedule, all steps as one batch |
| ``prompt`` | the prompt | once per prompt |
| ``prompt_timestep`` | both (SDXL's added conditioning) | once per schedule and prompt |
| ``image`` | the image prompt (IP-Adapter) | once per image prompt |
| ``hint`` | the control picture | once per control picture |
| ``step`` | anything else | every step |

(Consel & Danvy 1993, "Tutorial notes on partial evaluation", call this binding-time analysis.) What crosses from an
earlier stage into the step is packed: values of one kind are joined on axis 1, or on the next one where axis 1 is of
no fixed length (the tokens of a prompt), so a step reads one table row per stage, not dozens of small tensors. Nothing
here knows of UNets: the stages of the inputs are all that is given.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.passes.guidance_sharing import is_expansion, use_one_index
from controlrt.runtime.manifest import Stage

STAGES: tuple[Stage, ...] = ("timestep", "prompt", "prompt_timestep", "image", "hint", "step")
LAYOUT = "layout"
"""What only the plan decides: which picture each row belongs to. Depending on it alone does not make a value late."""

_STAGE_OF: dict[frozenset[str], Stage] = {
    frozenset({"timestep"}): "timestep",
    frozenset({"prompt"}): "prompt",
    frozenset({"prompt", "timestep"}): "prompt_timestep",
    frozenset({"prompt", "timestep", LAYOUT}): "prompt_timestep",
    frozenset({"image"}): "image",
    frozenset({"hint"}): "hint",
}
_AXIS: dict[Stage, str] = {
    "timestep": "steps",
    "prompt": "prompts",
    "prompt_timestep": "entries",
    "image": "prompts",
    "hint": "batch",
    "step": "batch",
}
"""What the leading axis of a stage's values counts."""
COPIES = frozenset(("Expand", "Tile", "Resize", "Gather", "ConstantOfShape", "Concat", "Pad"))
"""Operators that only move data: where the result is larger than what it is made of, they stay behind the cut."""


def dependencies(graph: ir.Graph, labels: Mapping[str, str]) -> dict[ir.Value, frozenset[str]]:
    """For every value, the labels of the graph inputs it depends on.

    Args:
        graph: in topological order.
        labels: label of each graph input by name; inputs that are not named have the label "step".
    """
    found: dict[ir.Value, frozenset[str]] = {}
    for value in graph.inputs:
        if not value.is_initializer():
            found[value] = frozenset({labels.get(value.name or "", "step")})
    for node in graph:
        union: frozenset[str] = frozenset().union(*(found.get(v, frozenset()) for v in _read(node)))
        for output in node.outputs:
            found[output] = union
    return found


def cut(model: ir.Model, labels: Mapping[str, str], index: str = "rows") -> dict[Stage, ir.Model]:
    """Cuts ``model``, which stays as it is, into one program per stage; a stage with nothing in it has none.

    The step's outputs keep their names and order. An output that is known before the step becomes an output of its
    stage's program instead (a T2I-Adapter's features come out of a pure hint program). What crosses is named
    ``<stage>_<number>``.

    Args:
        model: opset 18 or later, in topological order.
        labels: "timestep", "prompt", "image" or "hint" by input name, LAYOUT for the index; other inputs belong to the
            step.
        index: name of the input that expands pictures to rows.
    """
    model = model.clone()
    graph = model.graph
    rows = next((value for value in graph.inputs if value.name == index), None)
    if rows is not None:
        use_one_index(rows)
    stage_of = _stages(graph, labels)
    early: dict[Stage, list[ir.Value]] = defaultdict(list)
    for output in graph.outputs:
        early[stage_of.get(output, "step")].append(output)
    late = early.pop("step", [])
    crossing = _crossing(graph, stage_of, late)
    packs = [
        _Pack(stage=stage, number=number, values=values, expanded=expanded)
        for stage in STAGES
        for number, (expanded, values) in enumerate(_groups(crossing.get(stage, ()), stage_of, rows))
    ]
    programs: dict[Stage, ir.Model] = {}
    for stage in STAGES[:-1]:
        joined = [pack for pack in packs if pack.stage == stage]
        if joined or early[stage]:
            programs[stage] = _stage_program(model, stage, joined, early[stage], index)
    if late:
        graph.outputs[:] = late
        for pack in packs:
            pack.enter(graph, rows)
        programs["step"] = pruned(model)
    return programs


def _read(node: ir.Node) -> Iterable[ir.Value]:
    return (value for value in node.inputs if value is not None)


def _stages(graph: ir.Graph, labels: Mapping[str, str]) -> dict[ir.Value, Stage]:
    """The stage at which each value is known, constants left out."""
    depends = dependencies(graph, labels)
    stage_of: dict[ir.Value, Stage] = {
        value: _STAGE_OF.get(labels_of, "step") for value, labels_of in depends.items() if labels_of
    }
    # what only copies, and makes more of it, stays with the step that reads it: what it is made of crosses
    for node in graph:
        output = node.outputs[0]
        if stage_of.get(output, "step") == "step" or set(_user_stages(output, stage_of)) != {"step"}:
            continue
        sources = sum(_elements(value) for value in _read(node) if value in stage_of)
        if node.op_type in COPIES and _elements(output) > sources:
            stage_of[output] = "step"
    return stage_of


def _user_stages(value: ir.Value, stage_of: Mapping[ir.Value, Stage]) -> list[Stage]:
    return [stage_of.get(output, "step") for user in value.consumers() for output in user.outputs]


def _elements(value: ir.Value) -> int:
    """How many elements, each dimension that is not fixed taken as two."""
    if value.shape is None:
        return 0
    return math.prod(dim if isinstance(dim, int) else 2 for dim in value.shape)


def _crossing(
    graph: ir.Graph, stage_of: Mapping[ir.Value, Stage], late: Sequence[ir.Value]
) -> dict[Stage, list[ir.Value]]:
    """What the step reads of each earlier stage, on the way to the outputs that are known late."""
    needed: set[ir.Value] = set(late)
    found: dict[Stage, dict[ir.Value, None]] = defaultdict(dict)
    for node in reversed(graph):
        if not needed.intersection(node.outputs):
            continue
        for value in _read(node):
            stage = stage_of.get(value, "step")
            if stage == "step":
                needed.add(value)
            else:
                found[stage][value] = None
    return {stage: list(reversed(values)) for stage, values in found.items()}


def _groups(
    values: Iterable[ir.Value], stage_of: Mapping[ir.Value, Stage], rows: ir.Value | None
) -> list[tuple[bool, list[ir.Value]]]:
    """Values that can be joined, and whether every one of them is expanded to rows before it is used."""
    groups: dict[object, list[ir.Value]] = defaultdict(list)
    for value in values:
        users = [user for user in value.consumers() if stage_of.get(user.outputs[0], "step") == "step"]
        expanded = (
            stage_of[value] in ("timestep", "hint")
            and rows is not None
            and all(is_expansion(user, rows) and not user.outputs[0].is_graph_output() for user in users)
        )
        axis = _joined_axis(value)
        key: object = value
        if axis is not None and value.shape is not None:
            key = (expanded, value.dtype, tuple(value.shape)[1:axis], tuple(value.shape)[axis + 1 :], axis)
        groups[key].append(value)
    return [(key[0] if isinstance(key, tuple) else False, group) for key, group in groups.items()]


def _joined_axis(value: ir.Value) -> int | None:
    """The first axis after the leading one that is a number; None where a later one is not, or has no name."""
    if value.shape is None:
        return None
    for axis, dim in enumerate(value.shape[1:], 1):
        if isinstance(dim, int):
            return axis if all(isinstance(later, int) for later in value.shape[axis:]) else None
        if dim.value is None:
            return None
    return None


@dataclass
class _Pack:
    """Values of one stage joined on one axis."""

    stage: Stage
    number: int
    values: list[ir.Value]
    expanded: bool

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.number}"

    @property
    def _axis(self) -> int:
        return _joined_axis(self.values[0]) or 1

    def leave(self, values: Sequence[ir.Value], graph: ir.Graph) -> ir.Value:
        """Joins the stage program's values into its output."""
        if len(values) == 1:
            node = ir.node("Identity", values, name=self.name)
        else:
            node = ir.node("Concat", values, {"axis": self._axis}, name=self.name)
        graph.append(node)
        output = node.outputs[0]
        output.name, output.type = self.name, self.values[0].type
        output.shape = self._shape(_AXIS[self.stage])
        return output

    def enter(self, graph: ir.Graph, rows: ir.Value | None) -> None:
        """Puts the joined value in place of the crossing ones in the step's graph."""
        leading = self.values[0].shape[0] if self.values[0].shape is not None else None
        if self.stage in ("prompt", "prompt_timestep", "image"):
            leading = ir.SymbolicDim("rows")
        source = ir.Value(name=self.name, shape=self._shape(leading), type=self.values[0].type)
        graph.inputs.append(source)
        targets = self.values
        first = next(iter(graph))
        if self.expanded and rows is not None:
            node = ir.node("Gather", [source, rows], {"axis": 0}, name=f"{self.name}.expand")
            first.prepend(node)
            source = node.outputs[0]
            expansions = [[u for u in value.consumers() if is_expansion(u, rows)] for value in self.values]
            source.shape, source.type = self._shape(ir.SymbolicDim("rows")), self.values[0].type
            targets = [users[0].outputs[0] for users in expansions]
            for users in expansions:
                for other in users[1:]:
                    other.outputs[0].replace_all_uses_with(users[0].outputs[0])
        if len(targets) == 1:
            targets[0].replace_all_uses_with(source)
            return
        extents = [_extent(value, self._axis) for value in targets]
        lengths = ir.Value(
            name=f"{self.name}.lengths",
            const_value=ir.tensor(np.array(extents, np.int64)),
            shape=ir.Shape([len(extents)]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.register_initializer(lengths)
        split = ir.node(
            "Split", [source, lengths], {"axis": self._axis}, num_outputs=len(targets), name=f"{self.name}.split"
        )
        first.prepend(split)
        for value, part in zip(targets, split.outputs, strict=True):
            part.name, part.shape, part.type = f"{value.name}.part", value.shape, value.type
            value.replace_all_uses_with(part)

    def _shape(self, leading: object) -> ir.Shape | None:
        shape = self.values[0].shape
        if shape is None:
            return None
        if isinstance(leading, str):
            leading = ir.SymbolicDim(leading)
        if len(self.values) == 1:
            return ir.Shape([leading, *shape[1:]])  # type: ignore[list-item]
        axis = self._axis
        joined = sum(_extent(value, axis) for value in self.values)
        return ir.Shape([leading, *shape[1:axis], joined, *shape[axis + 1 :]])  # type: ignore[list-item]


def _extent(value: ir.Value, axis: int) -> int:
    """Elements along the axis that values are joined on."""
    extent = value.shape[axis] if value.shape is not None else None
    if not isinstance(extent, int):
        raise ValueError(f"axis {axis} of {value.name} is not a number")
    return extent


def _stage_program(
    model: ir.Model, stage: Stage, packs: Sequence[_Pack], outputs: Sequence[ir.Value], index: str
) -> ir.Model:
    """The program that makes what ``stage`` passes on: ``packs``, and ``outputs`` of the whole."""
    copy = model.clone()
    graph = copy.graph
    by_name = {output.name: output for node in graph for output in node.outputs} | {v.name: v for v in graph.inputs}
    rows = by_name.get(index)
    kept = [by_name[output.name] for output in outputs]
    joined = [pack.leave([by_name[value.name] for value in pack.values], graph) for pack in packs]
    graph.outputs[:] = [*kept, *joined]
    if rows is not None:  # each entry of the batch is by itself here: nothing is expanded
        for node in list(graph):
            if is_expansion(node, rows):
                source = node.inputs[0]
                assert source is not None
                node.outputs[0].replace_all_uses_with(source)
    pruned(copy)
    for node in graph:
        for output in node.outputs:
            if output.shape is not None and output not in graph.outputs:
                output.shape = None  # the leading axis counts something else now
    for value in graph.inputs:
        if value.shape is not None and len(value.shape):
            value.shape = ir.Shape([ir.SymbolicDim(_AXIS[stage]), *value.shape[1:]])
    for value in kept:
        if value.shape is not None and len(value.shape):
            value.shape = ir.Shape([ir.SymbolicDim(_AXIS[stage]), *value.shape[1:]])
    return copy


def pruned(model: ir.Model) -> ir.Model:
    """``model`` without the nodes, initializers and inputs that nothing needs."""
    RemoveUnusedNodesPass()(model)
    inputs = model.graph.inputs
    inputs[:] = [value for value in inputs if value.uses() or value.is_graph_output()]
    return model
