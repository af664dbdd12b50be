"""SmoothQuant: the same outputs, and less lost in int8 where a channel stands out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import contents, feed, graph_of, session

from controlrt.compiler.passes.quantize import Quantize
from controlrt.compiler.quantization.smoothing import smooth

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 7, 16)).astype(np.float32)
SCALE = np.ones(16, np.float32)
SCALE[3] = 60  # a channel that stands out
BODY = "n = LayerNormalization (x, scale, bias) q = MatMul (n, a) k = MatMul (n, b) y = Concat <axis = 2> (q, k)"


def normalized(body: str = BODY) -> ir.Model:
    weights = {"a": RNG.standard_normal((16, 8)), "b": RNG.standard_normal((16, 8))}
    read = {name: value for name, value in weights.items() if f", {name})" in body}
    return graph_of("float[2, 7, 16] x", "float[2, 7, 16] y", body, scale=SCALE, bias=RNG.random(16), **read)


def seen(model: ir.Model) -> np.ndarray:
    """The largest magnitude of each channel after the normalization, by its definition."""
    scale, bias = (model.graph.initializers[name].const_value.numpy() for name in ("scale", "bias"))
    mean, variance = X.mean(axis=-1, keepdims=True), X.var(axis=-1, keepdims=True)
    return np.abs((X - mean) / np.sqrt(variance + 1e-5) * scale + bias).max(axis=(0, 1)).astype(np.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_outputs_stay(alpha: float) -> None:
    model = normalized()
    expected = feed(session(model), {"x": X})["y"]
    amax = smooth(model.graph, {"a": seen(model)}, alpha)
    assert len(amax) == 1
    found = feed(session(model), {"x": X})["y"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_largest_magnitude_is_what_it_says() -> None:
    model = normalized()
    (value, amax), *_ = smooth(model.graph, {"a": seen(model)}, 0.5).items()
    model.graph.outputs.append(value)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 7, 16])
    assert np.abs(feed(session(model), {"x": X})[value.name]).max() == pytest.approx(amax, rel=1e-4)


def test_int8_loses_less() -> None:
    model = normalized()
    expected = feed(session(model), {"x": X})["y"]
    channels = {"a": seen(model), "b": seen(model)}
    largest = {name: float(array.max()) for name, array in channels.items()}
    errors = {}
    for smoothed in (False, True):
        copy = model.clone()
        Quantize(largest, channel_amax=channels if smoothed else None)(copy)
        errors[smoothed] = np.sqrt(np.mean((feed(session(copy), {"x": X})["y"] - expected) ** 2))
    assert errors[True] < 0.5 * errors[False]


PARTS = "q = MatMul (n, a) y = Concat <axis = 2> (q, t)"


@pytest.mark.parametrize(
    "body",
    [
        f"n = LayerNormalization (x, scale, bias) k = Mul (n, n) t = MatMul (k, b) {PARTS}",
        f"i = LayerNormalization (x, scale, bias) n = Mul (i, scale) t = MatMul (n, b) {PARTS}",
        f"n = LayerNormalization (x, scale, bias) m = LayerNormalization (x, bias, bias) t = MatMul (m, a) {PARTS}",
    ],
)
def test_where_something_else_reads_or_makes_it_nothing_is_moved(body: str) -> None:
    model = normalized(body)
    before = contents(model)
    assert smooth(model.graph, {"a": np.ones(16, np.float32)}, 0.5) == {}
    assert contents(model) == before
