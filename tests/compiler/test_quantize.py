"""Layers in int8 and fp8, against the arithmetic written out in NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from compiler.graphs import graph_of
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from controlrt.compiler.passes.half_precision import HalfPrecision
from controlrt.compiler.passes.quantize import Inputs, Quantize, quantized_precision
from controlrt.compiler.quantization.arithmetic import REDUCED_LEVELS

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 5, 8)).astype(np.float32)
PICTURES = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
W = RNG.standard_normal((8, 6)).astype(np.float32)
KERNEL = RNG.standard_normal((7, 4, 3, 3)).astype(np.float32)


def int8(values: NDArray[Any], scale: NDArray[Any] | float) -> NDArray[Any]:
    """What int8 keeps of ``values``, in float64."""
    return np.clip(np.rint(values / np.asarray(scale, np.float32)), -128, 127) * np.float64(np.float32(scale))


def per_channel(weights: NDArray[Any], axis: int, levels: int = 127) -> NDArray[Any]:
    others = tuple(each for each in range(weights.ndim) if each != axis)
    return int8(weights, (np.abs(weights).max(axis=others, keepdims=True) / np.float32(levels)).astype(np.float32))


def fp8(values: NDArray[Any], amax: NDArray[Any] | float) -> NDArray[Any]:
    """What E4M3FN keeps of ``values``, in float64, where ``amax`` becomes 448."""
    scale = (np.asarray(amax) / np.float32(448)).astype(np.float32)
    scaled = (values.astype(np.float32) / scale).clip(-448, 448)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def run(model: ir.Model, *, fused: bool = False, **values: Any) -> NDArray[Any]:
    """In ONNX Runtime, operator by operator, or with what it makes of them."""
    options = onnxruntime.SessionOptions()
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    contents = ir.to_proto(model).SerializeToString()
    running = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    return np.asarray(running.run(["y"], values)[0])


def linear() -> ir.Model:
    model = graph_of("float[3, 5, 8] x", "float[3, 5, 6] y", "y = MatMul (x, w)", w=W)
    model.graph.initializers["w"].name = "unet.mid.to_q.weight"
    return model


def convolution() -> ir.Model:
    body = "y = Conv <pads = [1, 1, 1, 1]> (x, k, b)"
    model = graph_of("float[2, 4, 6, 6] x", "float[2, 7, h, w] y", body, k=KERNEL, b=np.arange(7.0))
    model.graph.initializers["k"].name = "unet.conv1.weight"
    return model


@pytest.mark.parametrize("inputs", ["int8", "uint8"])
@pytest.mark.parametrize("amax", [4.0, 1.0])
def test_a_linear_layer(inputs: Inputs, amax: float) -> None:
    model = linear()
    assert Quantize({"unet.mid.to_q": amax}, inputs=inputs)(model).modified
    expected = int8(X, amax / 127) @ per_channel(W, 1)
    np.testing.assert_allclose(run(model, x=X), expected, rtol=1e-4, atol=1e-4)
    assert quantized_precision(model.graph) == "int8"
    stored = model.graph.initializers["unet.mid.to_q.weight.int8"]
    assert stored.dtype == ir.DataType.INT8
    assert not stored.const_value.numpy().min() < -127


def test_a_convolution_keeps_its_bias() -> None:
    model = convolution()
    Quantize({"unet.conv1": 3.0})(model)
    kernel, x = per_channel(KERNEL, 0), np.pad(int8(PICTURES, 3 / 127), [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    expected = np.einsum("nchwij,ocij->nohw", windows, kernel) + np.arange(7)[:, None, None]
    np.testing.assert_allclose(run(model, x=PICTURES), expected, rtol=1e-4, atol=1e-4)
    assert model.graph.initializers["b"].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("inputs", ["int8", "uint8"])
def test_in_seven_bits_no_cpu_overflows(inputs: Inputs) -> None:
    """Those without VNNI add two products in 16 bits; with eight bits they are wrong by more than half here."""
    model = linear()
    Quantize({"unet.mid.to_q": 1.0}, inputs=inputs, weight_levels=REDUCED_LEVELS)(model)
    expected = int8(X, 1 / 127) @ per_channel(W, 1, REDUCED_LEVELS)
    for fused in (False, True):
        np.testing.assert_allclose(run(model, x=X, fused=fused), expected, rtol=1e-4, atol=1e-4)


def test_weights_alone() -> None:
    model = linear()
    Quantize({"unet.mid.to_q": 1.0}, inputs=None)(model)
    np.testing.assert_allclose(run(model, x=X), X @ per_channel(W, 1), rtol=1e-4, atol=1e-4)
    assert quantized_precision(model.graph) == "int8"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("amax", [4.0, 1.0])
def test_a_linear_layer_in_fp8(amax: float, fused: bool) -> None:
    model = linear()
    assert quantized_precision(model.graph) is None
    Quantize({"unet.mid.to_q": amax}, inputs="fp8")(model)
    expected = fp8(X, amax) @ fp8(W, np.abs(W).max(axis=0))
    np.testing.assert_allclose(run(model, x=X, fused=fused), expected, rtol=1e-4, atol=1e-4)
    assert quantized_precision(model.graph) == "fp8"
    assert model.graph.initializers["unet.mid.to_q.weight.fp8"].dtype == ir.DataType.FLOAT8E4M3FN


def test_a_convolution_in_fp8() -> None:
    model = convolution()
    Quantize({"unet.conv1": 3.0}, inputs="fp8")(model)
    kernel = fp8(KERNEL, np.abs(KERNEL).max(axis=(1, 2, 3), keepdims=True))
    x = np.pad(fp8(PICTURES, 3), [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    expected = np.einsum("nchwij,ocij->nohw", windows, kernel) + np.arange(7)[:, None, None]
    np.testing.assert_allclose(run(model, x=PICTURES), expected, rtol=1e-4, atol=1e-4)
    assert {value.name: value.dtype for value in model.graph.inputs} == {"x": ir.DataType.FLOAT}


def test_onnx_s_own_interpreter_agrees_on_fp8() -> None:
    model = linear()
    Quantize({"unet.mid.to_q": 2.0}, inputs="fp8")(model)
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": X})
    np.testing.assert_allclose(found, fp8(X, 2.0) @ fp8(W, np.abs(W).max(axis=0)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("largest", "fits"), [(1e-2, True), (1e-4, False)])
def test_fp8_scales_that_float16_cannot_say_leave_a_layer(largest: float, fits: bool) -> None:
    model = linear()
    scaled = (W / np.abs(W).max(axis=0) * largest).astype(np.float32)
    model.graph.initializers["unet.mid.to_q.weight"].const_value = ir.tensor(scaled)
    HalfPrecision({})(model)
    assert Quantize({"unet.mid.to_q": 4.0}, inputs="fp8")(model).modified is fits
    np.testing.assert_allclose(run(model, x=X), X @ scaled, atol=0.2 * largest * 8)


def test_readers_of_one_value_share_its_quantizer() -> None:
    body = "q = MatMul (x, a) k = MatMul (x, b) s = Add (q, k) y = Add (s, x)"
    model = graph_of("float[3, 5, 8] x", "float[3, 5, 8] y", body, a=np.eye(8), b=np.eye(8))
    Quantize({"a": 2.0, "b": 3.0})(model)
    names = [node.op_type for node in model.graph]
    assert names.count("QuantizeLinear") == 1
    np.testing.assert_allclose(run(model, x=X), 2 * int8(X, 3 / 127) + X, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ("float[3, 5, 8] x, float[8, 8] w", "y = MatMul (x, w)"),
        ("float[3, 5, 8] x", "y = Mul (x, x)"),
        ("float[3, 5, 8] x", "y = Add (x, c)"),
    ],
)
def test_what_is_no_layer_stays(inputs: str, body: str) -> None:
    constants = {"c": np.ones(8)} if "c)" in body else {}
    model = graph_of(inputs, "float[3, 5, 8] y", body, **constants)
    assert not Quantize({})(model).modified
    with pytest.raises(ValueError, match="the graph has no layer 'c'"):
        Quantize({"c": 1.0, "w": 1.0})(model)


def test_a_second_time_there_is_nothing_to_do() -> None:
    model = linear()
    Quantize({"unet.mid.to_q": 1.0})(model)
    assert not Quantize({})(model).modified


def test_grouped_convolutions_stay() -> None:
    grouped = np.ones((4, 1, 3, 3))
    model = graph_of("float[2, 4, 6, 6] x", "float[2, 4, 4, 4] y", "y = Conv <group = 4> (x, k)", k=grouped)
    with pytest.raises(ValueError, match="the graph has no layer 'k'"):
        Quantize({"k": 1.0})(model)


def test_in_float16_scales_are_float16() -> None:
    model = linear()
    HalfPrecision({})(model)
    Quantize({"unet.mid.to_q": 4.0})(model)
    types = {node.op_type: node.outputs[0].dtype for node in model.graph}
    assert types["DequantizeLinear"] == ir.DataType.FLOAT16
    expected = int8(X.astype(np.float16), float(np.float16(4 / 127))) @ per_channel(W.astype(np.float16), 1)
    np.testing.assert_allclose(run(model, x=X), expected, rtol=2e-2, atol=2e-2)
