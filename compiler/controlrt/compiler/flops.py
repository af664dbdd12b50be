"""FLOPs of a graph, counted from shapes alone.

The rules are those of PyTorch's ``torch.utils.flop_counter.FlopCounterMode``: a multiply-add is two FLOPs, and only
what multiplies matrices counts (Conv, ConvTranspose, MatMul, Gemm, and the two products inside Attention, masked or
not). Norms, activations, softmax and biases count nothing.

The shapes recorded on intermediate values are not used: passes leave them out, or leave outdated names in them.
The graph is walked once from its inputs, whose dimensions the caller binds. At every node onnx's own shape inference is
run on that node alone, with the sizes that are known by then as constants, so a graph whose sides vary (its reshape
targets are computed from ``Shape``) needs no more than one whose sides are fixed. Weights are never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from controlrt.compiler.graph import constant
from controlrt.runtime.errors import ControlRTError

MIN_OPSET = 13
"""Before it, Squeeze and Unsqueeze had their axes elsewhere."""
_KEEPS_SHAPE = ("GroupNormalization", "MeanVarianceNormalization", "MultiHeadAttention")
"""The operators that onnx 1.23 cannot infer. Their output is as large as their first input."""
_NOT_STANDARD = (("com.microsoft", "MultiHeadAttention"),)
"""The operators of other domains that have a rule here: passes put them in."""
_REFUSED = (
    "ConvInteger",
    "DeformConv",
    "Einsum",
    "GRU",
    "LSTM",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "RNN",
)
"""Operators that multiply matrices and have no rule here: counting nothing for them would be wrong."""
_MAX_SIZES = 1024
_MAX_SCALES = 8
"""How many elements, integers and others, a constant may have that decides a shape. Larger ones are weights."""


class FlopCountError(ControlRTError):
    """A graph whose FLOPs cannot be told exactly. ``node`` is the node at fault, if it is one."""

    def __init__(self, message: str, node: ir.Node | None = None) -> None:
        self.node = node
        super().__init__(message)


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """FLOPs of one run of a graph. ``by_op_type`` has every counted operator, with 0 where the graph has none."""

    by_op_type: Mapping[str, int]

    @property
    def total(self) -> int:
        """FLOPs of all operators."""
        return sum(self.by_op_type.values())


@dataclass(frozen=True, kw_only=True)
class GraphSize:
    """How large a graph is. ``parameters`` are the elements of its floating-point initializers."""

    nodes: int
    parameters: int
    parameter_bytes: int


def count_flops(graph: ir.Graph, dims: Mapping[str, int]) -> FlopCount:
    """Counts the FLOPs of one run of ``graph``, which stays as it is.

    Args:
        graph: in topological order, of standard ONNX operators and those that a pass puts in.
        dims: the size of each named dimension of the inputs. A dimension such as ``height/8`` or ``4*h`` is looked up
            as it is written, then evaluated. Names that no input has are ignored.

    Raises:
        FlopCountError: an input has a dimension that ``dims`` does not bind, the shapes of a counted node cannot be
            told, or a node is of an unknown domain, holds a graph, or multiplies matrices but has no rule here.
    """
    shapes = infer_shapes(graph, dims)
    by_op_type = dict.fromkeys(_RULES, 0)
    for node in graph:
        _refuse_uncountable(node)
        if node.op_type in _RULES:
            by_op_type[node.op_type] += _RULES[node.op_type](_Operands(node, shapes))
    return FlopCount(by_op_type=by_op_type)


def graph_size(graph: ir.Graph) -> GraphSize:
    """Counts nodes and parameters, without reading the weights."""
    tensors = [value.const_value for value in graph.initializers.values()]
    weights = [tensor for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point()]
    return GraphSize(
        nodes=len(graph),
        parameters=sum(tensor.size for tensor in weights),
        parameter_bytes=sum(tensor.nbytes for tensor in weights),
    )


def infer_shapes(graph: ir.Graph, dims: Mapping[str, int]) -> dict[ir.Value, ir.Shape]:
    """The shape of every value, as far as it can be told; a dimension that depends on data is ``SymbolicDim(None)``.

    Args:
        graph: see ``count_flops``.
        dims: see ``count_flops``.

    Raises:
        FlopCountError: an input has a dimension that ``dims`` does not bind, or the opset is older than MIN_OPSET.
    """
    opset = graph.opset_imports.get("", MIN_OPSET)
    if opset < MIN_OPSET:
        raise FlopCountError(f"the graph has opset {opset}, but FLOPs are counted from opset {MIN_OPSET} on")
    walk = _Walk(shapes={}, types={}, sizes={}, opset_imports=graph.opset_imports)
    for value in (*graph.inputs, *graph.initializers.values()):
        walk.enter(value, dims)
    for node in graph:
        walk.visit(node)
    return walk.shapes


def _refuse_uncountable(node: ir.Node) -> None:
    if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in _NOT_STANDARD:
        reason = f"is an operator of {node.domain}; inline functions, and count before an engine puts in its own"
    elif _holds_graph(node):
        reason = "holds a graph, and how often that runs is not known"
    elif node.op_type in _REFUSED:
        reason = f"multiplies matrices but has no rule; these have: {', '.join(_RULES)}"
    else:
        return
    raise FlopCountError(f"cannot count FLOPs: {_named(node)} {reason}", node)


def _holds_graph(node: ir.Node) -> bool:
    return any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _attributes(node))


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())


def _named(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"


@dataclass(frozen=True)
class _Operands:
    """The shapes around a counted node; those that are not known are refused."""

    node: ir.Node
    shapes: Mapping[ir.Value, ir.Shape]

    def input(self, position: int) -> tuple[int, ...]:
        shape = self.optional_input(position)
        if shape is None:
            raise FlopCountError(f"cannot count FLOPs: {_named(self.node)} has no input {position}", self.node)
        return shape

    def optional_input(self, position: int) -> tuple[int, ...] | None:
        value = self.node.inputs[position] if position < len(self.node.inputs) else None
        return None if value is None else self._shape(value)

    def output(self) -> tuple[int, ...]:
        return self._shape(self.node.outputs[0])

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        shape = _static(self.shapes.get(value))
        if shape is None:
            found = _dims(self.shapes.get(value))
            lost = _where_lost(value, self.shapes)
            raise FlopCountError(
                f"cannot count FLOPs: {_named(self.node)} needs the shape of {value.name!r}, which is {found}: {lost}",
                self.node,
            )
        return shape


def _where_lost(value: ir.Value, shapes: Mapping[ir.Value, ir.Shape]) -> str:
    """Names the first node, upwards of ``value``, that knows the shapes of its inputs but not of its output."""
    while (producer := value.producer()) is not None:
        unknown = [v for v in producer.inputs if v is not None and _static(shapes.get(v)) is None]
        if not unknown:
            return f"the output of {_named(producer)} depends on data, or its inputs do not fit"
        value = unknown[0]
    return f"the input {value.name!r} of the graph does not say its shape"


def _static(shape: ir.Shape | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    dims = tuple(dim for dim in shape if isinstance(dim, int))
    return dims if len(dims) == len(shape) else None


def _dims(shape: ir.Shape | None) -> str:
    if shape is None:
        return "not known"
    return f"({', '.join('?' if str(dim) == 'None' else str(dim) for dim in shape)})"


# ------------------------------------------------------------------------------------------------------------- rules


def _conv(operands: _Operands) -> int:
    """Every output position multiplies the whole kernel: (channels out, channels in / groups, *kernel)."""
    batch, _, *sides = operands.output()
    return 2 * batch * math.prod(sides) * math.prod(operands.input(1))


def _conv_transpose(operands: _Operands) -> int:
    """Every input position multiplies the whole kernel: (channels in, channels out / groups, *kernel)."""
    batch, _, *sides = operands.input(0)
    return 2 * batch * math.prod(sides) * math.prod(operands.input(1))


def _matmul(operands: _Operands) -> int:
    return 2 * math.prod(operands.output()) * operands.input(0)[-1]


def _gemm(operands: _Operands) -> int:
    transposed = operands.node.attributes.get_int("transA", 0)
    return 2 * math.prod(operands.output()) * operands.input(0)[0 if transposed else 1]


def _attention(operands: _Operands) -> int:
    """Q K^T and its product with V, over all keys, those of the past included.

    Operands are (batch, heads, length, head size) or (batch, length, heads * head size). Where query heads share a key
    head, each of them multiplies it.
    """
    query, key, value = (operands.input(position) for position in range(3))
    if len(query) == 4:
        batch, heads, length, head_size = query
        keys, value_size = key[2], value[3]
    else:
        heads, kv_heads = (operands.node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
        if not heads or not kv_heads:
            raise FlopCountError(
                f"cannot count FLOPs: {_named(operands.node)} has operands of {len(query)} dimensions; "
                "they must have 4, or 3 with q_num_heads and kv_num_heads",
                operands.node,
            )
        batch, length, hidden_size = query
        head_size, keys, value_size = hidden_size // heads, key[1], value[2] // kv_heads
    past_key = operands.optional_input(4)
    if past_key is not None:
        keys += past_key[2]
    return 2 * batch * heads * length * keys * (head_size + value_size)


def _multi_head_attention(operands: _Operands) -> int:
    """The same two products; operands are (batch, length, heads * head size), heads alike in all of them."""
    (batch, length, hidden_size), keys = operands.input(0), operands.input(1)[1]
    return 4 * batch * length * keys * hidden_size


_RULES: dict[str, Callable[[_Operands], int]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
}


# ------------------------------------------------------------------------------------------------------------ shapes


_Array = np.ndarray[Any, Any]
_ONNX_INFERENCE = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """What is known of the values reached so far. ``sizes`` are the elements of small tensors that are constant."""

    shapes: dict[ir.Value, ir.Shape]
    types: dict[ir.Value, ir.TypeProtocol]
    sizes: dict[ir.Value, _Array]
    opset_imports: dict[str, int]

    def enter(self, value: ir.Value, dims: Mapping[str, int]) -> None:
        """Takes in an input or an initializer of the graph."""
        tensor = value.const_value
        if tensor is None:
            self._know(value, _bound(value, dims), value.type)
        else:
            self._know(value, ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype))
            self._know_constant(value)

    def visit(self, node: ir.Node) -> None:
        """Finds out about the outputs of ``node``."""
        output = node.outputs[0]
        elements = self._evaluate(node)
        if elements is not None:
            self.sizes[output] = elements
            self._know(output, ir.Shape(elements.shape), ir.TensorType(ir.DataType.from_numpy(elements.dtype)))
        elif node.op_type in _KEEPS_SHAPE and node.inputs[0] is not None:
            self._know(output, self.shapes.get(node.inputs[0]), self.types.get(node.inputs[0]))
        elif not _holds_graph(node):
            self._infer(node)
            self._know_constant(output)

    def _know(self, value: ir.Value, shape: ir.Shape | None, type_: ir.TypeProtocol | None) -> None:
        if shape is not None:
            # a name that inference makes up at one node must not be taken for that of another node
            self.shapes[value] = ir.Shape([dim if isinstance(dim, int) else None for dim in shape])
        if type_ is not None:
            self.types[value] = type_

    def _know_constant(self, value: ir.Value) -> None:
        tensor = constant(value)
        if tensor is None or len(tensor.shape) > 1:
            return
        if tensor.size <= (_MAX_SIZES if tensor.dtype.is_integer() else _MAX_SCALES):
            self.sizes[value] = tensor.numpy()

    def _evaluate(self, node: ir.Node) -> _Array | None:
        """The elements of the output, where they follow from sizes that are known."""
        if node.op_type == "Shape":
            return self._evaluate_shape(node)
        evaluate = _EVALUATE.get(node.op_type)
        if evaluate is None or any(value is not None and value not in self.sizes for value in node.inputs):
            return None
        return np.asarray(evaluate(node, *(None if value is None else self.sizes[value] for value in node.inputs)))

    def _evaluate_shape(self, node: ir.Node) -> _Array | None:
        source = node.inputs[0]
        if source is None or source not in self.shapes:
            return None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        dims = _static(ir.Shape(self.shapes[source][start:end]))
        return None if dims is None else np.array(dims, np.int64)

    def _infer(self, node: ir.Node) -> None:
        """Runs onnx's shape inference on a graph of ``node`` alone."""
        given = dict.fromkeys(value for value in node.inputs if value is not None)
        if any(value not in self.types for value in given):
            return
        inputs, constants = [], []
        copies: dict[ir.Value | None, ir.Value | None] = {None: None}
        for number, value in enumerate(given):
            if value in self.sizes:
                constants.append(ir.node("Constant", [], {"value": ir.tensor(self.sizes[value])}))
                copy = constants[-1].outputs[0]
                copy.name = f"input_{number}"
            else:
                copy = ir.Value(name=f"input_{number}", shape=self.shapes.get(value), type=self.types[value])
                inputs.append(copy)
            copies[value] = copy
        # an output without a name is one that the node leaves out
        outputs = [ir.Value(name=output.name and f"output_{number}") for number, output in enumerate(node.outputs)]
        alone = ir.Node(node.domain, node.op_type, [copies[v] for v in node.inputs], _attributes(node), outputs=outputs)
        graph = ir.Graph(inputs, (), nodes=[*constants, alone], opset_imports=self.opset_imports, name="alone")
        _ONNX_INFERENCE(ir.Model(graph, ir_version=10))
        for output, found in zip(node.outputs, outputs, strict=True):
            self._know(output, found.shape, found.type)


def _bound(value: ir.Value, dims: Mapping[str, int]) -> ir.Shape | None:
    """The shape of an input of the graph with sizes in place of names."""
    if value.shape is None:
        return None
    bound: list[int | None] = []
    for dim in value.shape:
        size = dim if isinstance(dim, int) else _size(dim, dims)
        if size is None and not isinstance(dim, int) and dim.value is not None:
            given = ", ".join(f"{name}={number}" for name, number in dims.items()) or "no dimensions"
            raise FlopCountError(
                f"cannot count FLOPs: the input {value.name!r} is {_dims(value.shape)}, "
                f"and {dim.value!r} does not follow from {given}; bind its size"
            )
        bound.append(size)
    return ir.Shape(bound)


def _size(dim: ir.SymbolicDim, dims: Mapping[str, int]) -> int | None:
    if dim.value is not None and dim.value in dims:
        return dims[dim.value]
    try:
        size = dim.evaluate(dims)
    except ValueError:  # a name that does not read as an expression
        return None
    return size if isinstance(size, int) else None


def _cast(node: ir.Node, data: _Array) -> _Array:
    return data.astype(ir.DataType(node.attributes.get_int("to")).numpy())


def _divide(_: ir.Node, left: _Array, right: _Array) -> _Array:
    """Integers are divided towards zero."""
    quotient: _Array = left / right
    return np.trunc(quotient).astype(left.dtype) if left.dtype.kind in "iu" else quotient


def _reshape(node: ir.Node, data: _Array, shape: _Array) -> _Array:
    keeps = node.attributes.get_int("allowzero", 0) == 0
    return data.reshape([data.shape[axis] if dim == 0 and keeps else dim for axis, dim in enumerate(shape.tolist())])


def _slice(
    _: ir.Node, data: _Array, starts: _Array, ends: _Array, axes: _Array | None = None, steps: _Array | None = None
) -> _Array:
    index = [slice(None)] * data.ndim
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        axis = number if axes is None else axes.tolist()[number]
        index[axis] = slice(start, end, None if steps is None else steps.tolist()[number])
    return data[tuple(index)]


def _squeeze(_: ir.Node, data: _Array, axes: _Array | None = None) -> _Array:
    return np.squeeze(data, None if axes is None else tuple(axes.tolist()))


_EVALUATE: dict[str, Callable[..., Any]] = {
    "Add": lambda _, left, right: left + right,
    "Cast": _cast,
    "Concat": lambda node, *parts: np.concatenate(parts, node.attributes.get_int("axis")),
    "Div": _divide,
    "Gather": lambda node, data, indices: np.take(data, indices, node.attributes.get_int("axis", 0)),
    "Identity": lambda _, data: data,
    "Mul": lambda _, left, right: left * right,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": lambda _, left, right: left - right,
    "Unsqueeze": lambda _, data, axes: np.expand_dims(data, tuple(axes.tolist())),
}
"""The arithmetic that exporters do on sizes."""
