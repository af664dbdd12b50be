"""Moves outliers of channels from what layers read into their weights: SmoothQuant, Xiao et al. 2023, arXiv 2211.10438.

A channel that is much larger than the others takes the int8 levels of all. Dividing channel ``j`` by

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)        (equation 4)

and multiplying row ``j`` of the weights by it changes nothing but how well both are rounded. The division goes into
the scale and bias of the layer normalization before, so it costs nothing; where something else comes before, nothing is
moved.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.graph import constant, new_initializer
from controlrt.compiler.quantization.layers import Layer, layer_of

_LEAST = 1e-5
"""Of a channel that is never anything else than 0."""


def smooth(graph: ir.Graph, channel_amax: Mapping[str, NDArray[np.float32]], alpha: float) -> dict[ir.Value, float]:
    """Smooths what layers after layer normalizations read.

    Args:
        graph: is changed.
        channel_amax: the largest magnitude of each channel that a layer reads, (channels,), by layer name.
        alpha: from 0 to 1; how much is moved.

    Returns:
        The largest magnitude of every value that was smoothed.
    """
    found: dict[ir.Value, float] = {}
    for node in tuple(graph):
        if node.op_type != "LayerNormalization" or node.outputs[0].is_graph_output():
            continue
        value = node.outputs[0]
        readers = [layer_of(use.node) if use.idx == 0 else None for use in value.uses()]
        layers = [layer for layer in readers if layer is not None and layer.node.op_type != "Conv"]
        seen = next((channel_amax[layer.name] for layer in layers if layer.name in channel_amax), None)
        if seen is None or not layers or len(layers) != len(readers) or not _is_private(node, layers):
            continue
        factors = _factors(seen, layers, alpha)
        _divide(graph, node, factors)
        for layer in layers:
            _multiply(graph, layer, factors)
        found[value] = float((seen / factors).max())
    return found


def _is_private(node: ir.Node, layers: list[Layer]) -> bool:
    """Whether the scale, bias and weights are constants of these nodes alone, of one number of channels."""
    scale = constant(node.inputs[1])
    own = all(len(layer.weight.uses()) == 1 for layer in layers)
    return scale is not None and own and node.attributes.get_int("axis", -1) == -1


def _factors(seen: NDArray[np.float32], layers: list[Layer], alpha: float) -> NDArray[np.float32]:
    weights = np.zeros_like(seen)
    for layer in layers:
        tensor = constant(layer.weight)
        assert tensor is not None  # or it were no layer
        weights = np.maximum(weights, np.abs(tensor.numpy()).max(axis=layer.output_axis))
    factors = np.maximum(seen, _LEAST) ** alpha / np.maximum(weights, _LEAST) ** (1 - alpha)
    return np.asarray(factors / np.exp(np.log(factors).mean()), np.float32)  # of mean 1, so that magnitudes stay


def _divide(graph: ir.Graph, node: ir.Node, factors: NDArray[np.float32]) -> None:
    for index, value in enumerate(node.inputs):
        tensor = constant(value)
        if index > 0 and value is not None and tensor is not None:
            array = (tensor.numpy().astype(np.float32) / factors).astype(tensor.dtype.numpy())
            node.replace_input_with(index, new_initializer(graph, f"{value.name}.smooth", ir.tensor(array)))


def _multiply(graph: ir.Graph, layer: Layer, factors: NDArray[np.float32]) -> None:
    tensor = constant(layer.weight)
    assert tensor is not None
    along = np.expand_dims(factors, layer.output_axis)

    def multiplied() -> ir.TensorProtocol:
        return ir.tensor((tensor.numpy().astype(np.float32) * along).astype(tensor.dtype.numpy()))

    lazy = ir.LazyTensor(multiplied, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))
    layer.node.replace_input_with(1, new_initializer(graph, f"{layer.weight.name}.smooth", lazy))
