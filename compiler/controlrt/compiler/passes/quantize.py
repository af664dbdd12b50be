"""Convolutions and linear layers in int8: explicit QuantizeLinear and DequantizeLinear around what they read.

A layer reads ``Dequantize(Quantize(x))`` and ``Dequantize(W)``, and its output stays what it was; a backend that has
int8 products computes them on the integers. Weights are symmetric with one scale for each output channel, inputs
symmetric with one scale for the tensor, as Krishnamoorthi 2018, arXiv 1806.08342 recommends and TensorRT requires:

    q(x) = clip(round(x / s), -128, 127),    s = amax / 127

Layers that read the same value share its quantizer, so the projections to queries, keys and values read one int8
tensor. Nothing else is quantized: biases, sums and the residuals of a ControlNet stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.graph import constant, new_initializer
from controlrt.compiler.quantization.arithmetic import LEVELS, quantize, quantize_weights, scales_of
from controlrt.compiler.quantization.layers import Layer, layers_of
from controlrt.compiler.quantization.smoothing import smooth

Inputs = Literal["int8", "uint8"]
_ZERO_POINT = 128
"""Of inputs that are stored in uint8."""


class Quantize(ir.passes.InPlacePass):
    """Rewrites layers; see the module.

    Args:
        amax: the largest magnitude that a layer's input keeps, by layer name; other layers stay as they are.
        inputs: what layers read: "int8", or "uint8" with the zero point 128, which ONNX Runtime's CPU provider is
            fastest with, or None to leave inputs as they are and to store weights alone in int8.
        weight_levels: the largest int8 of weights.
        channel_amax: the largest magnitude of each channel, by layer name, to smooth what layers after layer
            normalizations read; see ``quantization.smoothing``.
        smoothing: how much, from 0 to 1.
    """

    def __init__(
        self,
        amax: Mapping[str, float],
        *,
        inputs: Inputs | None = "int8",
        weight_levels: int = LEVELS,
        channel_amax: Mapping[str, NDArray[np.float32]] | None = None,
        smoothing: float = 0.5,
    ) -> None:
        super().__init__()
        self.amax, self.inputs, self.weight_levels = amax, inputs, weight_levels
        self.channel_amax, self.smoothing = channel_amax or {}, smoothing

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``.

        Raises:
            ValueError: the graph lacks a layer that is named.
        """
        smoothed = smooth(model.graph, self.channel_amax, self.smoothing)
        chosen = [layer for layer in layers_of(model.graph) if layer.name in self.amax]
        missing = self.amax.keys() - {layer.name for layer in chosen}
        if missing:
            raise ValueError(f"the graph has no layer {min(missing)!r}")
        shared: dict[ir.Value, float] = {}
        for layer in chosen:
            amax = smoothed.get(layer.input, self.amax[layer.name])
            shared[layer.input] = max(shared.get(layer.input, 0.0), amax)
        chosen = [layer for layer in chosen if _has_scales(layer, shared[layer.input])]
        inputs = {
            value: value if self.inputs is None else _input(model.graph, value, shared[value], self.inputs)
            for value in dict.fromkeys(layer.input for layer in chosen)
        }
        weights: dict[tuple[ir.Value, int], ir.Value] = {}
        for layer in chosen:
            key = layer.weight, layer.output_axis
            if key not in weights:
                weights[key] = _weight(model.graph, layer, self.weight_levels)
            layer.node.replace_input_with(0, inputs[layer.input])
            layer.node.replace_input_with(1, weights[key])
        return ir.passes.PassResult(model, bool(weights))


def _has_scales(layer: Layer, amax: float) -> bool:
    """Whether the graph's type can say the scales of a layer: float16 has no small ones, float32 all but 0."""
    tensor = constant(layer.weight)
    assert tensor is not None  # or it were no layer
    if amax == 0 or _numpy(layer.weight) != np.float16:
        return amax > 0
    others = tuple(axis for axis in range(len(tensor.shape)) if axis != layer.output_axis)
    channels = np.abs(tensor.numpy().astype(np.float32)).max(axis=others)
    least = min(amax, float(channels[channels > 0].min(initial=np.inf)))
    return bool(least / LEVELS >= np.finfo(np.float16).tiny)


def _input(graph: ir.Graph, value: ir.Value, amax: float, inputs: Inputs) -> ir.Value:
    """``value`` rounded to what int8 holds, right after where it is made."""
    scale = new_initializer(graph, f"{value.name}.scale", ir.tensor(scales_of(amax).astype(_numpy(value))))
    zero = np.array(_ZERO_POINT, np.uint8) if inputs == "uint8" else np.array(0, np.int8)
    zero_point = new_initializer(graph, f"{value.name}.zero_point", ir.tensor(zero))
    quantize = ir.node("QuantizeLinear", [value, scale, zero_point], name=f"{value.name}.quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero_point], name=f"{value.name}.int8")
    integers, output = quantize.outputs[0], dequantize.outputs[0]
    integers.name, integers.shape = f"{value.name}.quantized", value.shape
    integers.type = ir.TensorType(ir.DataType.UINT8 if inputs == "uint8" else ir.DataType.INT8)
    output.name, output.shape, output.type = f"{value.name}.dequantized", value.shape, value.type
    producer = value.producer()
    if producer is not None:
        producer.append([quantize, dequantize])
    else:
        next(iter(graph)).prepend([quantize, dequantize])
    return output


def has_int8(graph: ir.Graph) -> bool:
    """Whether any layer of ``graph`` is in int8."""
    return any(node.op_type == "DequantizeLinear" for node in graph)


def _weight(graph: ir.Graph, layer: Layer, levels: int) -> ir.Value:
    """The weights as int8 and its scales, read back right before the layer."""
    tensor = constant(layer.weight)
    assert tensor is not None  # or it were no layer
    shape, axis = tensor.shape.numpy(), layer.output_axis

    @functools.cache
    def quantized() -> tuple[NDArray[np.int8], NDArray[np.floating]]:
        """By the scales as the graph's type has them."""
        weights = tensor.numpy()
        scales = quantize_weights(weights, axis, levels)[1].astype(_numpy(layer.weight))
        return quantize(weights, scales.astype(np.float32), axis).clip(-levels, levels), scales

    def integers() -> ir.TensorProtocol:
        return ir.tensor(quantized()[0])

    def scales() -> ir.TensorProtocol:
        return ir.tensor(quantized()[1])

    name = layer.weight.name
    read = [
        new_initializer(graph, f"{name}.int8", ir.LazyTensor(integers, dtype=ir.DataType.INT8, shape=ir.Shape(shape))),
        new_initializer(
            graph, f"{name}.scales", ir.LazyTensor(scales, dtype=tensor.dtype, shape=ir.Shape([shape[axis]]))
        ),
    ]
    node = ir.node("DequantizeLinear", read, {"axis": axis}, name=f"{name}.dequantize")
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{name}.dequantized", ir.Shape(shape), ir.TensorType(tensor.dtype)
    layer.node.prepend(node)
    return output


def _numpy(value: ir.Value) -> np.dtype[np.floating]:
    """The NumPy type of a floating point value."""
    if value.dtype is None:
        raise ValueError(f"the graph says nothing of the type of {value.name}")
    return value.dtype.numpy()
