"""3x3 convolutions by Winograd's minimal filtering on rows: six 1x3 convolutions on a quarter of the rows each.

Matches ``Conv`` in float32: 3x3, constant weights, stride 1, padding 1, no dilation, no groups, on a picture whose
height is a known multiple of 4.

Gives, for every four rows of the output, F(4, 3) of Lavin & Gray 2015, arXiv 1509.09308, section 4.3, along the height
alone. With x0..x5 the six rows that four rows of the output read, and w0, w1, w2 the rows of the kernel,

    y0..y3 = A^T [(G w) * (B^T x)],   * being a convolution along the row, summed over channels.

B^T x and A^T are sums of whole rows, so they are elementwise operators on strided slices. G w is computed in float64
when the model is written, and rounded once. The bias goes into the second product, which every row takes once.

It is exact in real numbers, not in float32: sums of rows with factors up to 8 cancel in the result. The error is three
to five times that of the plain convolution's own rounding, about 1e-6 of the largest value. In half precision it would
be too much.

Saves half of the multiplications (six rows of three taps for four rows of nine) and costs weights twice as large: where
the picture is smaller than MIN_SIDE they are most of the memory and little of the time, so there it stays as it is. On
both sides of the height and width at once, as in the paper, it saves more multiplications but moves 2.25 times the data
and holds four times the weights. One thread of an EPYC, float32, milliseconds:

TIMES
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from controlrt.compiler.graph import constant, new_initializer

ROWS = 4
"""Of the output at a time; they read two more."""
MIN_SIDE = 16
MIN_CHANNELS = 64
"""With fewer, sums of rows cost what the products save."""

_G = np.array(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6]]
    + [[0, 0, 1]],
    np.float64,
)
"""(product, row of the kernel)."""


class WinogradConvolution(ir.passes.InPlacePass):
    """Convolves rows in fours; see the module.

    The 3x3 weights stay behind as initializers that nothing reads, for RemoveUnusedNodesPass.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        constants = _Constants(model.graph)
        found = [_rewrite(node, model.graph, constants) for node in tuple(model.graph) if node.op_type == "Conv"]
        return ir.passes.PassResult(model, any(found))


class _Constants:
    """The initializers of one graph that are new, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._small: dict[tuple[object, ...], ir.Value] = {}
        self._kernels: dict[ir.Value, list[ir.Value]] = {}

    def factor(self, number: int) -> ir.Value:
        return self._made("times", number, np.array(number, np.float32))

    def ints(self, *elements: int) -> ir.Value:
        return self._made("ints", *elements, np.array(elements, np.int64))

    def kernels(self, weight: ir.Value, tensor: ir.TensorProtocol) -> list[ir.Value]:
        if weight not in self._kernels:
            self._kernels[weight] = [
                new_initializer(self.graph, f"{weight.name}.winograd_{product}", _kernel(tensor, product))
                for product in range(len(_G))
            ]
        return self._kernels[weight]

    def _made(self, kind: str, *key: object) -> ir.Value:
        *name, array = key
        if (kind, *name) not in self._small:
            assert isinstance(array, np.ndarray)
            self._small[kind, *name] = new_initializer(
                self.graph, "_".join(map(str, ("winograd", kind, *name))), ir.tensor(array)
            )
        return self._small[kind, *name]
