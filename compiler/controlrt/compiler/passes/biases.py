"""Biases that an operator further down can add itself: what ``SkipGroupNorm`` and ``SkipLayerNorm`` take apart."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from controlrt.compiler.graph import constant, new_initializer, only_consumer


def split_bias(value: ir.Value, reader: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    """What ``value`` is without its bias, and the bias (channels,) of its last axis; the graph stays as it is.

    The bias is that of an Add behind a MatMul, or the third input of an NhwcConv, where ``reader`` alone reads the sum.
    An NhwcConv's value comes back itself: ``drop_bias`` takes the bias off once it is added elsewhere.
    """
    producer = value.producer()
    if producer is None or only_consumer(value) is not reader:
        return value, None
    if producer.op_type == "NhwcConv" and len(producer.inputs) > 2 and producer.inputs[2] is not None:
        return value, producer.inputs[2]
    found = product_and_bias(producer)
    return (value, None) if found is None else found


def product_and_bias(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The product of a MatMul and the constant (channels,) that ``add`` adds to it; None where it is not that."""
    if add.op_type != "Add" or add.domain:
        return None
    for product, bias in (add.inputs, add.inputs[::-1]):
        tensor, matmul = constant(bias), product.producer() if product is not None else None
        if product is None or bias is None or matmul is None or tensor is None or len(tensor.shape) != 1:
            continue
        if matmul.op_type == "MatMul" and not matmul.domain:
            return product, bias
    return None


def drop_bias(value: ir.Value) -> None:
    """Takes the bias off the NhwcConv that makes ``value``; anything else is left."""
    producer = value.producer()
    if producer is not None and producer.op_type == "NhwcConv" and len(producer.inputs) > 2:
        producer.resize_inputs(2)


def join_biases(graph: ir.Graph, biases: list[ir.Value]) -> ir.Value | None:
    """One bias for several, summed when it is read; None where there is none."""
    if len(biases) < 2:
        return biases[0] if biases else None
    tensors = [tensor for bias in biases if (tensor := constant(bias)) is not None]
    if len(tensors) != len(biases):
        raise ValueError("a bias is not a constant")
    dtype = tensors[0].dtype

    def summed() -> ir.TensorProtocol:
        total = np.sum([tensor.numpy().astype(np.float32) for tensor in tensors], axis=0)
        return ir.tensor(total.astype(dtype.numpy()))

    lazy = ir.LazyTensor(summed, dtype=dtype, shape=ir.Shape(tensors[0].shape.numpy()))
    return new_initializer(graph, f"{biases[0].name}.joined", lazy)
