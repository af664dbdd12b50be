"""Reshapes that do not name the rows: their targets say "as many as there are" on axis 0.

Matches a ``Reshape`` whose target is a constant or computed from shapes, where the leading dimension of the result is
provably that of the input: the recorded shapes name the same dimension or number, or what follows axis 0 has as many
elements before and after (an exporter writes ``[-1, 4096, 320]`` or ``Concat(Shape(latents)[0:1], [4096, 320])``).

Gives the same ``Reshape`` with ``allowzero=0`` and a constant target: 0 (as in the input) for axis 0 and every other
dimension that stays, numbers where they are known, and one -1 for one that is not. Where more are not known, such as a
height and a width, the target stays a ``Concat`` and only its first part becomes 0.

It is exact: it moves no data, and for the recorded shapes, none of which is empty, the new target means the old one.
What computed that may be left without a reader, for RemoveUnusedNodesPass.

Saves the arithmetic on shapes in every step, and lets later passes move the expansion from pictures to rows, a Gather
on axis 0, past these nodes: the same Reshape then works on either.
"""

from __future__ import annotations

import math
import re

import onnx_ir as ir

from controlrt.compiler.graph import constant_ints, small_ints

Dim = int | ir.SymbolicDim


class RowAgnosticReshapes(ir.passes.InPlacePass):
    """Frees the targets of Reshape nodes from the size of axis 0; see the module."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        targets = _Targets(model.graph)
        found = [_rewrite(node, targets) for node in tuple(model.graph) if node.op_type == "Reshape"]
        return ir.passes.PassResult(model, any(found))


class _Targets:
    """The new targets of one graph, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._computed: dict[ir.Value, ir.Value] = {}

    def computed(self, concat: ir.Node) -> ir.Value:
        """``concat`` with its first part, one element long, set to 0."""
        old = concat.outputs[0]
        if old not in self._computed:
            node = ir.node(
                "Concat", [small_ints(self.graph, 0), *concat.inputs[1:]], {"axis": 0}, name=f"{old.name}.rows.Concat"
            )
            new = node.outputs[0]
            new.name, new.type, new.shape = f"{old.name}.rows", old.type, old.shape
            self.graph.insert_after(concat, node)
            self._computed[old] = new
        return self._computed[old]


def _rewrite(reshape: ir.Node, targets: _Targets) -> bool:
    if reshape.domain or len(reshape.inputs) != 2:
        return False
    (x, target), y = reshape.inputs, reshape.outputs[0]
    if x is None or x.shape is None or target is None or _is_row_agnostic(reshape, target):
        return False
    dims = _output_dims(reshape, x.shape, target)
    if not dims or 0 in dims or 0 in x.shape or not _keeps_rows(x.shape, dims):
        return False
    if _is_known(x.shape[0]):
        dims[0] = x.shape[0]
    elements = tuple(_element(x.shape, axis, dim) for axis, dim in enumerate(dims))
    if elements.count(-1) <= 1:
        new = small_ints(targets.graph, *elements)
    else:
        concat = target.producer()
        if concat is None or not _leads_with_rows(concat, dims):
            return False
        new = targets.computed(concat)
    reshape.replace_input_with(1, new)
    reshape.attributes.pop("allowzero", None)
    if not y.is_graph_output():
        y.shape = ir.Shape(dims)
    return True


def _is_row_agnostic(reshape: ir.Node, target: ir.Value) -> bool:
    elements = constant_ints(target)
    concat = target.producer()
    if elements is None and concat is not None and concat.op_type == "Concat":
        elements = constant_ints(concat.inputs[0])
    return elements is not None and elements[:1] == (0,) and reshape.attributes.get_int("allowzero", 0) == 0


def _output_dims(reshape: ir.Node, before: ir.Shape, target: ir.Value) -> list[Dim] | None:
    """The dimensions of the result as far as target and recorded shape give them; None where neither may be trusted."""
    recorded = reshape.outputs[0].shape
    elements = constant_ints(target)
    if elements is None:
        return list(recorded) if recorded is not None and _comes_from_shapes(target) else None
    if recorded is None or len(recorded) != len(elements):
        recorded = ir.Shape([None] * len(elements))
    dims: list[Dim] = []
    for axis, element in enumerate(elements):
        if element == 0 and (reshape.attributes.get_int("allowzero", 0) != 0 or axis >= len(before)):
            return None
        dims.append(element if element > 0 else before[axis] if element == 0 else recorded[axis])
    return dims


def _comes_from_shapes(value: ir.Value | None) -> bool:
    """Whether ``value`` is computed from nothing but shapes and constants."""
    if constant_ints(value) is not None:
        return True
    node = value.producer() if value is not None else None
    if node is None or not node.inputs:
        return False
    return node.op_type in ("Shape", "Size") or all(_comes_from_shapes(part) for part in node.inputs)


def _keeps_rows(before: ir.Shape, after: list[Dim]) -> bool:
    """Whether axis 0 is as long after as before: by name, or because the rest has as many elements."""
    if not len(before):
        return False
    rest = [*before[1:], *after[1:]]
    sizes = [dim for dim in rest if isinstance(dim, int)]
    return _same(before[0], after[0]) or (
        len(sizes) == len(rest) and math.prod(sizes[: len(before) - 1]) == math.prod(sizes[len(before) - 1 :])
    )


def _is_known(dim: Dim) -> bool:
    return isinstance(dim, int) or dim.value is not None


def _same(before: Dim, after: Dim) -> bool:
    """Whether both are the same dimension. Two without a name are not, though they compare equal."""
    return _is_known(before) and before == after


def _element(before: ir.Shape, axis: int, dim: Dim) -> int:
    if axis == 0 or (axis < len(before) and _same(before[axis], dim)):
        return 0
    return dim if isinstance(dim, int) else -1


def _leads_with_rows(concat: ir.Node, dims: list[Dim]) -> bool:
    """Whether ``concat`` gives the rows by themselves first, then dimensions that are not 0 and not counted in rows."""
    parts = [value.shape for value in concat.inputs if value is not None]
    rows = _symbols(dims[0])
    return (
        concat.op_type == "Concat"
        and len(parts) == len(concat.inputs) > 1
        and parts[0] == ir.Shape([1])
        and not any(0 in (constant_ints(value) or ()) for value in concat.inputs[1:])
        and not any(rows & _symbols(dim) for dim in dims[1:])
    )


def _symbols(dim: Dim) -> set[str]:
    return set() if isinstance(dim, int) or dim.value is None else set(re.findall(r"[A-Za-z_][\w.]*", dim.value))
