"""Guidance sharing: what does not depend on the prompt is computed once per picture, not once per row.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) runs two rows for every picture, and the exported graph
expands pictures to rows at once: ``Gather(latents, rows)``. Until the first cross-attention both rows are the same.
Almost every operator acts on each row by itself, so ``f(Gather(x, rows)) == Gather(f(x), rows)``, and the expansion can
sink through ``f``. This pass sinks it as far as it goes: to the first node that mixes in a value which differs from row
to row. The arithmetic on each row is unchanged, so it is exact. It holds with guidance, without (one row per picture),
and for any number of pictures, because it only moves the expansion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.graph import constant, constant_ints

ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Not", "Pow", "Reciprocal"),
        *("Relu", "Round", "Sigmoid", "Sin", "Softplus", "Sqrt", "Sub", "Swish", "Tanh", "Where"),
    )
)
FIRST_INPUT_ONLY = frozenset(
    (
        *("Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool", "GroupNormalization"),
        *("InstanceNormalization", "SpaceToDepth"),
    )
)
"""Operators that act on each row of their first input; all others are weights."""


class GuidanceSharing(ir.passes.InPlacePass):
    """Sinks ``Gather(x, index, axis=0)`` through everything that acts on each row by itself.

    Args:
        index: name of the graph input that says which picture each row belongs to: (rows,), int64.
    """

    def __init__(self, index: str = "rows") -> None:
        super().__init__()
        self.index = index

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``; see the module."""
        index = next((value for value in model.graph.inputs if value.name == self.index), None)
        if index is None:
            return ir.passes.PassResult(model, False)
        modified = use_one_index(index)
        per_picture: dict[ir.Value, ir.Value] = {}
        sunk: set[ir.Node] = set()
        entries: int | str | None = None
        for node in list(model.graph):
            if is_expansion(node, index) and (found := _entries(_first(node))) is not None and entries in (None, found):
                entries = found  # what is gathered from something else, a table say, has other entries
                per_picture[node.outputs[0]] = _first(node)
            elif any(value in per_picture for value in node.inputs if value is not None) and acts_on_rows(
                node, per_picture
            ):
                per_picture.update(zip(node.outputs, _compute_per_picture(node, per_picture), strict=True))
                sunk.add(node)
        for rows, pictures in per_picture.items():
            if rows.producer() in sunk:
                _expand_where_used(rows, pictures, index, sunk)
        if sunk:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified or bool(sunk))


def is_expansion(node: ir.Node | None, index: ir.Value) -> bool:
    """Whether ``node`` is ``Gather(x, index, axis=0)``."""
    return (
        node is not None
        and node.op_type == "Gather"
        and node.inputs[1] is index
        and node.attributes.get_int("axis", 0) == 0
    )


def _entries(value: ir.Value) -> int | str | None:
    """The length of axis 0, or its name; None where it is not known."""
    if value.shape is None or not len(value.shape):
        return None
    leading = value.shape[0]
    return leading if isinstance(leading, int) else leading.value


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"{node.op_type} {node.name} has no first input")
    return value


def use_one_index(index: ir.Value) -> bool:
    """Replaces the copies of the index that the exporter makes (a Reshape to the rank it has) by the index itself."""
    found = False
    for user in list(index.consumers()):
        same = user.op_type == "Identity" or (
            user.op_type == "Reshape" and constant_ints(user.inputs[1]) in ((-1,), (0,))
        )
        if same and not user.outputs[0].is_graph_output():
            user.outputs[0].replace_all_uses_with(index)
            found = True
    return found


def _compute_per_picture(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> Sequence[ir.Value]:
    """A copy of ``node`` on one row per picture, put before it."""
    leading = next(per_picture[value] for value in node.inputs if value in per_picture).shape
    outputs = []
    for output in node.outputs:
        shape = None
        if output.shape is not None and leading is not None:
            shape = ir.Shape([leading[0], *output.shape[1:]])
        outputs.append(ir.Value(name=f"{output.name}.picture", shape=shape, type=output.type))
    copy = ir.Node(
        node.domain,
        node.op_type,
        [per_picture.get(value, value) if value is not None else None for value in node.inputs],
        node.attributes.values(),
        outputs=outputs,
        name=f"{node.name or node.outputs[0].name}.picture",
    )
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(node, copy)
    return outputs


def _expand_where_used(rows: ir.Value, pictures: ir.Value, index: ir.Value, sunk: set[ir.Node]) -> None:
    """Expands ``pictures`` to rows for the users that were not sunk, if there are any."""
    users = [(user, position) for user, position in rows.uses() if user not in sunk]
    if not users and not rows.is_graph_output():
        return
    users_left = []
    for user, position in users:
        if _broadcasts(user, rows, pictures):
            user.replace_input_with(position, pictures)
        else:
            users_left.append((user, position))
    if not users_left and not rows.is_graph_output():
        return
    producer = rows.producer()
    assert producer is not None
    assert isinstance(producer.graph, ir.Graph)
    name = rows.name
    expansion = ir.node("Gather", [pictures, index], {"axis": 0}, name=f"{name}.expand")
    expanded = expansion.outputs[0]
    expanded.shape, expanded.type = rows.shape, rows.type
    producer.graph.insert_after(producer, expansion)
    for user, position in users_left:
        user.replace_input_with(position, expanded)
    if rows.is_graph_output():
        outputs = producer.graph.outputs
        outputs[list(outputs).index(rows)] = expanded
    rows.name, expanded.name = f"{name}.rows", name


def _broadcasts(user: ir.Node, rows: ir.Value, pictures: ir.Value) -> bool:
    """Whether ``user`` gives the same from the one picture there is, by broadcasting it over the rows."""
    if user.op_type not in ("Add", "Sub", "Mul", "Div") or pictures.shape is None or pictures.shape[0] != 1:
        return False
    output = user.outputs[0].shape
    others = [value for value in user.inputs if value is not None and value is not rows]
    return output is not None and any(
        other.shape is not None and len(other.shape) == len(output) and other.shape[0] == output[0] for other in others
    )


def acts_on_rows(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    """Whether ``node`` commutes with the expansion: its inputs are expanded values and constants alike for all rows."""
    if node.domain not in ("", "ai.onnx"):
        return False
    given = [value for value in node.inputs if value is not None]
    if node.op_type == "Reshape":
        return _reshape(node, per_picture)
    if any(value not in per_picture and constant(value) is None for value in given):
        return False
    if node.op_type in ELEMENTWISE:
        return _elementwise(node, per_picture)
    if node.op_type in FIRST_INPUT_ONLY:
        return _only_first(node, per_picture)
    rule = _RULES.get(node.op_type)
    return rule is not None and rule(node, per_picture)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _only_first(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    return node.inputs[0] in per_picture and not any(value in per_picture for value in node.inputs[1:])


def _elementwise(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    rank = _rank(node.outputs[0])
    return rank is not None and all(
        _rank(value) == rank if value in per_picture else _same_for_rows(value, rank)
        for value in node.inputs
        if value is not None
    )


def _same_for_rows(value: ir.Value, rank: int) -> bool:
    """Whether a constant broadcasts over the rows of a value of ``rank``."""
    return value.shape is not None and (len(value.shape) < rank or value.shape[0] == 1)


def _axis_is_not_rows(default: int) -> Callable[[ir.Node, dict[ir.Value, ir.Value]], bool]:
    def rule(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
        rank = _rank(node.inputs[0])
        return (
            _only_first(node, per_picture) and rank is not None and node.attributes.get_int("axis", default) % rank != 0
        )

    return rule


def _concat(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    rank = _rank(node.inputs[0])
    all_expanded = all(value in per_picture for value in node.inputs)
    return all_expanded and rank is not None and node.attributes.get_int("axis", 0) % rank != 0


def _gemm(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return (
        _only_first(node, per_picture)
        and node.attributes.get_int("transA", 0) == 0
        and (bias is None or _same_for_rows(bias, 2))
    )


def _matmul(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    left, right = (_rank(value) for value in node.inputs)
    if left is None or right is None:
        return False
    if all(value in per_picture for value in node.inputs):
        return left == right >= 3
    if node.inputs[0] in per_picture:
        return right == 2 and left >= 2
    return left == 2 and right >= 3


def _transpose(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    perm = node.attributes.get_ints("perm", None)
    return _only_first(node, per_picture) and perm is not None and perm[0] == 0


def _reshape(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    """Whether the target says "as many as there are" for axis 0, as RowAgnosticReshapes writes it."""
    target = node.inputs[1]
    if node.inputs[0] not in per_picture or target in per_picture or node.attributes.get_int("allowzero", 0) != 0:
        return False
    elements = constant_ints(target)
    if elements is None and target is not None:
        concat = target.producer()
        elements = constant_ints(concat.inputs[0]) if concat is not None and concat.op_type == "Concat" else None
    return bool(elements) and elements is not None and elements[0] == 0


def _axes_are_not_rows(position: int) -> Callable[[ir.Node, dict[ir.Value, ir.Value]], bool]:
    def rule(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
        axes = constant_ints(node.inputs[position]) if len(node.inputs) > position else None
        ranks = (_rank(node.inputs[0]), _rank(node.outputs[0]))
        rank = ranks[1] if node.op_type == "Unsqueeze" else ranks[0]
        return (
            _only_first(node, per_picture)
            and axes is not None
            and len(axes) > 0  # no axes are all of them
            and rank is not None
            and all(a % rank != 0 for a in axes)
        )

    return rule


def _resize(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    if "axes" in node.attributes or len(node.inputs) != 3:
        return False
    scales = constant(node.inputs[2])
    return _only_first(node, per_picture) and scales is not None and scales.size > 0 and float(scales.numpy()[0]) == 1.0


def _attention(node: ir.Node, per_picture: dict[ir.Value, ir.Value]) -> bool:
    operands, rest = node.inputs[:3], node.inputs[3:]
    return all(value in per_picture for value in operands) and all(value is None for value in rest)


_RULES: dict[str, Callable[[ir.Node, dict[ir.Value, ir.Value]], bool]] = {
    "Attention": _attention,
    "Concat": _concat,
    "Gather": _axis_is_not_rows(0),
    "Gemm": _gemm,
    "LayerNormalization": _axis_is_not_rows(-1),
    "LogSoftmax": _axis_is_not_rows(-1),
    "MatMul": _matmul,
    "ReduceMean": _axes_are_not_rows(1),
    "ReduceSum": _axes_are_not_rows(1),
    "Resize": _resize,
    "Slice": _axes_are_not_rows(3),
    "Softmax": _axis_is_not_rows(-1),
    "Split": _axis_is_not_rows(0),
    "Squeeze": _axes_are_not_rows(1),
    "Transpose": _transpose,
    "Unsqueeze": _axes_are_not_rows(1),
}
