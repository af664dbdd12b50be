"""3x3 convolutions by Winograd's minimal filtering on rows: six 1x3 convolutions on a quarter of the rows each.

Matches ``Conv`` in float32: 3x3, constant weights, stride 1, padding 1, no dilation, no groups, on a picture whose
height is a known multiple of 4.

Gives, for every four rows of the output, F(4, 3) of Lavin & Gray 2015, arXiv 1509.09308, section 4.3, along the height
alone. With x0..x5 the six rows that four rows of the output read, and w0, w1, w2 the rows of the kernel,

    y0..y3 = A^T [(G w) * (B^T x)],   * being a convolution along the row, summed over channels.

B^T x and A^T are sums of whole rows, so they are elementwise operators on strided slices. G w is computed in float64
when the model is written, and rounded once. The bias goes into the second product, which every row takes once.

It is exact in real numbers, not in float32: sums of rows with factors up to 8 cancel in the result. Against float64 the
error is twice that of the plain convolution on average and three to four times at most, about 1e-6 of the largest value
in ONNX Runtime and 4e-6 in OpenVINO. In half precision it would be too much.

Saves half of the multiplications (six rows of three taps for four rows of nine) and costs weights twice as large: where
the picture is smaller than MIN_SIDE they are most of the memory and little of the time, so there it stays as it is.
One thread of an EPYC, float32, milliseconds, as many channels out as in; F(2, 3) on rows has 4/3 of the weights,
F(2x2, 3x3) on both sides 16/9:

                         Conv                F(2, 3)             this                F(2x2, 3x3)
    x                    ORT     OpenVINO    ORT     OpenVINO    ORT     OpenVINO    ORT     OpenVINO
    (2, 320, 64, 64)     133     135         103     104         82      80          163     169
    (2, 640, 32, 32)     132     130         96      94          77      73          103     94
    (2, 1280, 16, 16)    133     127         97      95          82      79          90      80
    (2, 1280, 8, 8)      37      35          31      27          29      22          32      21
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.graph import constant, new_initializer, small_ints, small_number
from controlrt.compiler.passes.upsample_convolution import is_3x3

Dim = int | ir.SymbolicDim

ROWS = 4
"""Of the output at a time; they read two more."""
MIN_SIDE = 16
MIN_CHANNELS = 128
"""With fewer, sums of rows cost what the products save."""

_G = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float64,
)
"""(product, row of the kernel)."""


class WinogradConvolution(ir.passes.InPlacePass):
    """Convolves rows in fours; see the module.

    The 3x3 weights stay behind as initializers that nothing reads, for RemoveUnusedNodesPass.
    """

    float32_only = True
    """Rounded to half precision, what cancels here would not."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        kernels = _Kernels(model.graph)
        found = [_rewrite(node, kernels) for node in tuple(model.graph) if node.op_type == "Conv"]
        return ir.passes.PassResult(model, any(found))


class _Kernels:
    """The kernels of one graph that are transformed, each once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._made: dict[ir.Value, list[ir.Value]] = {}

    def of(self, weight: ir.Value, tensor: ir.TensorProtocol) -> list[ir.Value]:
        if weight not in self._made:
            self._made[weight] = [
                new_initializer(self.graph, f"{weight.name}.winograd_{product}", _kernel(tensor, factors))
                for product, factors in enumerate(_G)
            ]
        return self._made[weight]


class _Nodes:
    """The nodes that take the place of one convolution."""

    def __init__(self, y: ir.Value, graph: ir.Graph) -> None:
        self.made: list[ir.Node] = []
        self._graph = graph
        self._name, self._type = y.name, y.type

    def make(self, op_type: str, inputs: Sequence[ir.Value], shape: Sequence[Dim], **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{self._name}.{op_type}_{len(self.made)}")
        value = node.outputs[0]
        value.name, value.type, value.shape = node.name, self._type, ir.Shape(shape)
        self.made.append(node)
        return value

    def add(self, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.make("Add", [left, right], _dims(left))

    def sub(self, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.make("Sub", [left, right], _dims(left))

    def times(self, number: int, value: ir.Value) -> ir.Value:
        return self.make("Mul", [value, small_number(self._graph, number)], _dims(value))

    def ints(self, *elements: int) -> ir.Value:
        return small_ints(self._graph, *elements)


def _rewrite(conv: ir.Node, kernels: _Kernels) -> bool:
    x, y = conv.inputs[0], conv.outputs[0]
    weight = conv.inputs[1] if len(conv.inputs) > 1 else None
    tensor = constant(weight)
    if x is None or weight is None or tensor is None or not is_3x3(conv, tensor) or not _is_worth_it(x, tensor):
        return False
    nodes = _Nodes(y, kernels.graph)
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    products = _products(nodes, _transformed(nodes, x), kernels.of(weight, tensor), bias)
    result = _interleaved(nodes, _summed(nodes, products))
    ir.convenience.replace_nodes_and_values(kernels.graph, conv, [conv], nodes.made, [y], [result])
    return True


def _is_worth_it(x: ir.Value, weight: ir.TensorProtocol) -> bool:
    if x.dtype != ir.DataType.FLOAT or x.shape is None or len(x.shape) != 4:
        return False
    height, width = x.shape[2:]
    out_channels, in_channels, *_ = weight.shape.numpy()
    return (
        isinstance(height, int)
        and height % ROWS == 0
        and height >= MIN_SIDE
        and not (isinstance(width, int) and width < MIN_SIDE)
        and min(in_channels, out_channels) >= MIN_CHANNELS
    )


def _transformed(nodes: _Nodes, x: ir.Value) -> list[ir.Value]:
    """B^T x: six pictures of a quarter of the rows, each a sum of every fourth row from another one on."""
    rows, channels, height, width = _dims(x)
    assert isinstance(height, int)
    ints = nodes.ints
    padded = nodes.make("Pad", [x, ints(0, 0, 1, 0, 0, 0, 1, 0)], [rows, channels, height + 2, width])
    quarter = [rows, channels, height // ROWS, width]
    x0, x1, x2, x3, x4, x5 = (
        nodes.make("Slice", [padded, ints(row), ints(row + height - ROWS + 1), ints(2), ints(ROWS)], quarter)
        for row in range(6)
    )
    a, b = nodes.sub(x4, nodes.times(4, x2)), nodes.sub(x3, nodes.times(4, x1))
    c, d = nodes.sub(x4, x2), nodes.sub(x3, x1)
    twice_d = nodes.times(2, d)
    return [
        nodes.add(nodes.times(4, nodes.sub(x0, x2)), c),
        nodes.add(a, b),
        nodes.sub(a, b),
        nodes.add(c, twice_d),
        nodes.sub(c, twice_d),
        nodes.sub(nodes.sub(x5, x3), nodes.times(4, d)),
    ]


def _products(
    nodes: _Nodes, pictures: Sequence[ir.Value], kernels: Sequence[ir.Value], bias: ir.Value | None
) -> list[ir.Value]:
    products = []
    for product, (picture, kernel) in enumerate(zip(pictures, kernels, strict=True)):
        rows, _, quarter, width = _dims(picture)
        biased = [bias] if product == 1 and bias is not None else []
        shape = [rows, _dims(kernel)[0], quarter, width]
        products.append(nodes.make("Conv", [picture, kernel, *biased], shape, kernel_shape=[1, 3], pads=[0, 1, 0, 1]))
    return products


def _summed(nodes: _Nodes, products: Sequence[ir.Value]) -> list[ir.Value]:
    """A^T: of every four rows of the output, the first, the second and so on."""
    m0, m1, m2, m3, m4, m5 = products
    sum_12, difference_12 = nodes.add(m1, m2), nodes.sub(m1, m2)
    sum_34, twice = nodes.add(m3, m4), nodes.times(2, nodes.sub(m3, m4))
    return [
        nodes.add(nodes.add(m0, sum_12), sum_34),
        nodes.add(difference_12, twice),
        nodes.add(sum_12, nodes.times(4, sum_34)),
        nodes.add(nodes.add(difference_12, m5), nodes.times(4, twice)),
    ]


def _interleaved(nodes: _Nodes, pictures: Sequence[ir.Value]) -> ir.Value:
    rows, channels, quarter, width = _dims(pictures[0])
    assert isinstance(quarter, int)
    ints = nodes.ints
    parts = [nodes.make("Unsqueeze", [each, ints(3)], [rows, channels, quarter, 1, width]) for each in pictures]
    whole = nodes.make("Concat", parts, [rows, channels, quarter, ROWS, width], axis=3)
    height = quarter * ROWS
    target = ints(0, 0, height, width if isinstance(width, int) else -1)
    return nodes.make("Reshape", [whole, target], [rows, channels, height, width])


def _dims(value: ir.Value) -> list[Dim]:
    if value.shape is None:
        raise ValueError(f"the shape of {value.name} is not known")
    return list(value.shape)


def _kernel(weight: ir.TensorProtocol, factors: NDArray[np.float64]) -> ir.LazyTensor:
    """One row of G w: the 1x3 kernel of one product, summed when it is read."""
    out_channels, in_channels, *_ = weight.shape.numpy()

    def summed() -> ir.TensorProtocol:
        taps = weight.numpy()
        return ir.tensor(np.einsum("k,ockl->ocl", factors, taps.astype(np.float64))[:, :, None].astype(taps.dtype))

    return ir.LazyTensor(summed, dtype=weight.dtype, shape=ir.Shape([out_channels, in_channels, 1, 3]))
