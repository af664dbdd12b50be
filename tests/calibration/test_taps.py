"""Taps against NumPy: on graphs written by hand, and on whole tensors of the demo model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import graph_of
from numpy.typing import NDArray

from controlrt.calibration.taps import MAX_RANK, POSITIONS, SAMPLES, Tap, add_taps
from controlrt.compiler.quantization.layers import layers_of
from controlrt.compiler.reference import Reference
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BuildError

Arrays = dict[str, NDArray[Any]]
RNG = np.random.default_rng(0)


def weights(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, np.float32)


def run(model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
    with Reference({}) as reference:
        return reference.run(model, feeds)


def positions() -> NDArray[np.float64]:
    return RNG.random((SAMPLES, MAX_RANK))


def check(tap: Tap, found: Arrays, x: NDArray[np.float32], axis: int, where: NDArray[np.float64]) -> None:
    """The taps of ``x``, whose channels are on ``axis``."""
    others = tuple(each for each in range(x.ndim) if each != axis % x.ndim)
    np.testing.assert_array_equal(found[tap.amax], np.abs(x).max(axis=others))
    places = np.floor(where[:, : x.ndim] * x.shape).astype(np.int64)
    np.testing.assert_array_equal(found[tap.sample], x[tuple(places.T)])


GRAPHS = {
    "convolution": (
        "float[n, 3, 8, 10] x",
        "float[n, 5, 6, 8] y",
        "y = Conv(x, w)",
        weights(5, 3, 3, 3),
        (2, 3, 8, 10),
        1,
    ),
    "linear": ("float[n, 7, 6] x", "float[n, 7, 4] y", "y = MatMul(x, w)", weights(6, 4), (3, 7, 6), -1),
    "linear of rows": ("float[n, 6] x", "float[n, 4] y", "y = Gemm<transB=1>(x, w)", weights(4, 6), (3, 6), -1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_layer_by_itself(name: str) -> None:
    inputs, outputs, body, w, shape, axis = GRAPHS[name]
    model = graph_of(inputs, outputs, body, w=w)
    (tap,) = add_taps(model.graph)
    x, where = weights(*shape), positions()
    found = run(model, {"x": x, POSITIONS: where})
    assert tap.layers == ("w",)
    assert tap.channels == x.shape[axis]
    check(tap, found, x, axis, where)


def test_layers_that_read_the_same_share_a_tap() -> None:
    body = "h = Relu(x)  q = MatMul(h, wq)  k = MatMul(h, wk)  s = Add(q, k)  y = MatMul(s, wo)"
    model = graph_of("float[n, 7, 6] x", "float[n, 7, 4] y", body, wq=weights(6, 6), wk=weights(6, 6), wo=weights(6, 4))
    first, second = add_taps(model.graph)
    assert (first.layers, second.layers) == (("wq", "wk"), ("wo",))
    x, where = weights(2, 7, 6), positions()
    h = np.maximum(x, 0)
    check(first, run(model, {"x": x, POSITIONS: where}), h, -1, where)


def test_the_output_stays_as_it_was() -> None:
    model = graph_of("float[n, 3, 8, 8] x", "float[n, 5, 6, 6] y", "y = Conv(x, w)", w=weights(5, 3, 3, 3))
    x = weights(2, 3, 8, 8)
    before = run(model, {"x": x})
    add_taps(model.graph)
    np.testing.assert_array_equal(run(model, {"x": x, POSITIONS: positions()})["y"], before["y"])


def test_a_graph_without_layers_stays_as_it_was() -> None:
    model = graph_of("float[n, 6] x", "float[n, 6] y", "y = Relu(x)")
    assert add_taps(model.graph) == ()
    assert [value.name for value in model.graph.inputs] == ["x"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_wherever_it_is(value: float) -> None:
    model = graph_of("float[n, 3, 8, 8] x", "float[n, 5, 6, 6] y", "y = Conv(x, w)", w=weights(5, 3, 3, 3))
    (tap,) = add_taps(model.graph)
    for place in [(0, 0, 0, 0), (1, 2, 7, 7), (1, 1, 3, 4)]:
        x = weights(2, 3, 8, 8)
        x[place] = value
        assert not np.isfinite(run(model, {"x": x, POSITIONS: positions()})[tap.amax]).all()


def test_a_value_of_unknown_shape_is_told_of() -> None:
    body = "h = Relu(x)  y = MatMul(h, w)"
    model = graph_of("float[n, 7, 6] x", "float[n, 7, 4] y", body, infer=False, w=weights(6, 4))
    with pytest.raises(BuildError, match="says nothing of the shape of what w reads"):
        add_taps(model.graph)


@pytest.mark.bundle
@pytest.mark.parametrize("program", ["unet.step", "controlnet.canny.step"])
def test_every_tap_of_the_demo_model(bundle: Bundle, program: str) -> None:
    model = ir.load(bundle.file(f"programs/{program}.onnx"))
    read = {layer.name: layer for layer in layers_of(model.graph)}
    taps = add_taps(model.graph)
    assert {name for tap in taps for name in tap.layers} == set(read)
    whole = {tap: read[tap.layers[0]] for tap in taps}
    named = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    model.graph.outputs.extend({layer.input for layer in whole.values() if layer.input.name not in named})
    sides = {f"{side}/{2**power}": 256 // 2**power for side in ("width", "height") for power in range(7)}
    with Reference({"batch": 1, "rows": 2, "tokens": 77, "steps": 1} | sides) as reference:
        where = positions()
        feeds = reference.feeds(model) | {POSITIONS: where}
        found = feeds | reference.run(model, feeds)
    for tap, layer in whole.items():
        check(tap, found, found[layer.input.name or ""], layer.channels_axis, where)
