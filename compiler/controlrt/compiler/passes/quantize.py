"""Convolutions and linear layers in int8 or fp8: explicit QuantizeLinear and DequantizeLinear around what they read.

A layer reads ``Dequantize(Quantize(x))`` and ``Dequantize(W)``, and its output stays what it was; a backend that has
products of 8 bits computes them on those. Weights are symmetric with one scale for each output channel, inputs
symmetric with one scale for the tensor, as Krishnamoorthi 2018, arXiv 1806.08342 recommends and TensorRT requires:

    q(x) = clip(round(x / s), -128, 127),    s = amax / 127

in int8, and in fp8 (E4M3FN) the nearest number from -448 to 448 with ``s = amax / 448``.

Layers that read the same value share its quantizer, so the projections to queries, keys and values read one tensor of
8 bits. Nothing else is quantized: biases, sums and the residuals of a ControlNet stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.graph import constant, new_initializer
from controlrt.compiler.quantization.arithmetic import FP8, INT8, NumberFormat, quantize, quantize_weights, scales_of
from controlrt.compiler.quantization.layers import Layer, layers_of
from controlrt.compiler.quantization.smoothing import smooth

Inputs = Literal["int8", "uint8", "fp8"]
_ZERO_POINT = 128
"""Of inputs that are stored in uint8."""
_LEAST_HALF_SCALE = 2.0**-18
"""Of scales in float16: below its normal numbers there are fewer digits, here still six bits of them, which move a
threshold by less than 1%."""


class Quantize(ir.passes.InPlacePass):
    """Rewrites layers; see the module.

    Args:
        amax: the largest magnitude that a layer's input keeps, by layer name; other layers stay as they are.
        inputs: what layers read: "int8", or "uint8" with the zero point 128, which ONNX Runtime's CPU provider is
            fastest with, or None to leave inputs as they are and to store weights alone in int8; or "fp8", with
            weights in fp8 too.
        weight_levels: the largest int8 of weights; 127 where not given.
        channel_amax: the largest magnitude of each channel, by layer name, to smooth what layers after layer
            normalizations read; see ``quantization.smoothing``.
        smoothing: how much, from 0 to 1.
    """

    def __init__(
        self,
        amax: Mapping[str, float],
        *,
        inputs: Inputs | None = "int8",
        weight_levels: int | None = None,
        channel_amax: Mapping[str, NDArray[np.float32]] | None = None,
        smoothing: float = 0.5,
    ) -> None:
        super().__init__()
        self.amax, self.inputs, self.weight_levels = amax, inputs, weight_levels
        self.number_format = FP8 if inputs == "fp8" else INT8
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
        chosen = [layer for layer in chosen if _has_scales(layer, shared[layer.input], self.number_format)]
        inputs = {
            value: value if self.inputs is None else _input(model.graph, value, shared[value], self.inputs)
            for value in dict.fromkeys(layer.input for layer in chosen)
        }
        weights: dict[tuple[ir.Value, int], ir.Value] = {}
        for layer in chosen:
            key = layer.weight, layer.output_axis
            if key not in weights:
                weights[key] = _weight(model.graph, layer, self.weight_levels, self.number_format)
            layer.node.replace_input_with(0, inputs[layer.input])
            layer.node.replace_input_with(1, weights[key])
        return ir.passes.PassResult(model, bool(weights))


def _has_scales(layer: Layer, amax: float, number_format: NumberFormat) -> bool:
    """Whether the graph's type can say the scales of a layer: float16 has no small ones, float32 all but 0."""
    tensor = constant(layer.weight)
    assert tensor is not None  # or it were no layer
    if amax == 0 or _numpy(layer.weight) != np.float16:
        return amax > 0
    others = tuple(axis for axis in range(len(tensor.shape)) if axis != layer.output_axis)
    channels = np.abs(tensor.numpy().astype(np.float32)).max(axis=others)
    least = min(amax, float(channels[channels > 0].min(initial=np.inf)))
    return least / number_format.largest >= _LEAST_HALF_SCALE


def _input(graph: ir.Graph, value: ir.Value, amax: float, inputs: Inputs) -> ir.Value:
    """``value`` rounded to what 8 bits hold, right after where it is made."""
    largest = FP8.largest if inputs == "fp8" else INT8.largest
    scale = new_initializer(graph, f"{value.name}.scale", ir.tensor(scales_of(amax, largest).astype(_numpy(value))))
    zeros = {
        "int8": np.array(0, np.int8),
        "uint8": np.array(_ZERO_POINT, np.uint8),
        "fp8": np.array(0, FP8.dtype),
    }
    zero_point = new_initializer(graph, f"{value.name}.zero_point", ir.tensor(zeros[inputs]))
    quantize = ir.node("QuantizeLinear", [value, scale, zero_point], name=f"{value.name}.quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero_point], name=f"{value.name}.dequantize")
    rounded, output = quantize.outputs[0], dequantize.outputs[0]
    rounded.name, rounded.shape = f"{value.name}.quantized", value.shape
    rounded.type = ir.TensorType(ir.DataType.from_numpy(zeros[inputs].dtype))
    output.name, output.shape, output.type = f"{value.name}.dequantized", value.shape, value.type
    producer = value.producer()
    if producer is not None:
        producer.append([quantize, dequantize])
    else:
        next(iter(graph)).prepend([quantize, dequantize])
    return output


def quantized_precision(graph: ir.Graph) -> Literal["int8", "fp8"] | None:
    """What layers of ``graph`` are in; None where none is in 8 bits."""
    for node in graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            return "fp8" if node.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN else "int8"
    return None


def _weight(graph: ir.Graph, layer: Layer, levels: int | None, number_format: NumberFormat) -> ir.Value:
    """The weights in 8 bits and their scales, read back right before the layer."""
    tensor = constant(layer.weight)
    assert tensor is not None  # or it were no layer
    shape, axis = tensor.shape.numpy(), layer.output_axis
    dtype = ir.DataType.from_numpy(number_format.dtype)

    @functools.cache
    def quantized() -> tuple[NDArray[Any], NDArray[np.floating]]:
        """By the scales as the graph's type has them."""
        weights = tensor.numpy()
        scales = quantize_weights(weights, axis, levels, number_format)[1].astype(_numpy(layer.weight))
        rounded = quantize(weights, scales.astype(np.float32), axis, number_format)
        largest = levels or number_format.largest
        return rounded.astype(np.float32).clip(-largest, largest).astype(number_format.dtype), scales

    def rounded() -> ir.TensorProtocol:
        return ir.tensor(quantized()[0])

    def scales() -> ir.TensorProtocol:
        return ir.tensor(quantized()[1])

    name = layer.weight.name
    read = [
        new_initializer(
            graph, f"{name}.{number_format.name}", ir.LazyTensor(rounded, dtype=dtype, shape=ir.Shape(shape))
        ),
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
