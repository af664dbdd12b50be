"""1x1 convolutions with channels last as what they are: matrix products.

Matches ``com.microsoft.NhwcConv``, as ``ChannelsLast`` leaves it, of 1x1 kernels with stride 1 and no padding, whose
result is only added to something of its own shape: a convolution adds its bias for nothing, a product leaves that to
the residual's addition.

Gives ``MatMul`` of the picture (rows, height, width, channels) with the weights (in, out), and ``Add`` of the bias,
which ``SkipGroupNorm`` can take over.

It is exact.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from controlrt.compiler.graph import constant, new_initializer, only_consumer


class PointwiseConvolution(ir.passes.InPlacePass):
    """Multiplies matrices where convolutions are 1x1; see the module.

    Args:
        everywhere: whatever their results are read by.
    """

    typed = True

    def __init__(self, everywhere: bool = False) -> None:
        super().__init__()
        self.everywhere = everywhere

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        made: dict[ir.Value, ir.Value] = {}
        nodes = [node for node in tuple(model.graph) if node.op_type == "NhwcConv" and self._takes(node)]
        found = [_rewrite(node, model.graph, made) for node in nodes]
        return ir.passes.PassResult(model, any(found))

    def _takes(self, conv: ir.Node) -> bool:
        y = conv.outputs[0]
        reader = only_consumer(y)
        return self.everywhere or (
            reader is not None
            and reader.op_type == "Add"
            and y.shape is not None
            and all(value is not None and value.shape == y.shape for value in reader.inputs)
        )


def _rewrite(conv: ir.Node, graph: ir.Graph, made: dict[ir.Value, ir.Value]) -> bool:
    x, weight, *rest = conv.inputs
    tensor, attributes = constant(weight), conv.attributes
    if tensor is None or weight is None or tuple(tensor.shape)[1:3] != (1, 1):
        return False
    if set(attributes.get_ints("strides", (1,))) != {1} or any(attributes.get_ints("pads", (0,))):
        return False
    if weight not in made:
        made[weight] = new_initializer(graph, f"{weight.name}.matrix", _matrix(tensor))
    y = conv.outputs[0]
    product = ir.node("MatMul", [x, made[weight]], name=f"{y.name}.MatMul")
    new = [product]
    product.outputs[0].type, product.outputs[0].shape = y.type, y.shape
    if rest and rest[0] is not None:
        product.outputs[0].name = f"{y.name}.product"
        new.append(ir.node("Add", [product.outputs[0], rest[0]], name=f"{y.name}.Add"))
    result = new[-1].outputs[0]
    result.name, result.type, result.shape = y.name, y.type, y.shape
    ir.convenience.replace_nodes_and_values(graph, conv, [conv], new, [y], [result])
    return True


def _matrix(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Weights (out, 1, 1, in) as (in, out)."""
    outputs, _, _, inputs = tensor.shape.numpy()

    def matrix() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().reshape(outputs, inputs).T), tensor.dtype)

    return ir.LazyTensor(matrix, dtype=tensor.dtype, shape=ir.Shape([inputs, outputs]))
