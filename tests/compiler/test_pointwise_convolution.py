"""1x1 convolutions before and after they are matrix products, in NumPy against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import contents, graph_of, operators, read_by, run

from controlrt.compiler.passes.pointwise_convolution import PointwiseConvolution

RNG = np.random.default_rng(0)
SUM = "z = Add (s, y)"


def convolution(
    attributes: str = "kernel_shape = [1, 1]", operands: str = "x, w, b", end: str = SUM, **new: Any
) -> ir.Model:
    constants = {"w": RNG.normal(0, 1, (6, 1, 1, 4)), "b": RNG.normal(0, 1, 6)} | new
    text = f"y = com.microsoft.NhwcConv <{attributes}> ({operands}) {end}"
    inputs = "float[rows, 5, 7, 4] x, float[rows, 5, 7, 6] s"
    model = graph_of(inputs, "float[rows, h, v, 6] z", text, **read_by(text, constants))
    (y, *_), (_, s) = next(iter(model.graph)).outputs, model.graph.inputs
    y.shape, y.type = s.shape, s.type  # onnx infers no shape of the provider's operators
    return model


FIRES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "with bias": ({}, ["MatMul", "Add", "Add"]),
    "without bias": ({"operands": "x, w"}, ["MatMul", "Add"]),
    "defaults in full": (
        {"attributes": "kernel_shape = [1, 1], strides = [1, 1], pads = [0, 0, 0, 0], dilations = [1, 1]"},
        ["MatMul", "Add", "Add"],
    ),
}


@pytest.mark.parametrize("case", FIRES)
def test_same_result(case: str) -> None:
    options, expected_operators = FIRES[case]
    state = RNG.bit_generator.state
    before = convolution(**options)
    RNG.bit_generator.state = state
    after = convolution(**options)
    assert PointwiseConvolution()(after).modified
    assert operators(after) == expected_operators
    for rows in (1, 2):
        rng = np.random.default_rng(rows)
        values = {name: rng.normal(0, 1, (rows, 5, 7, n)).astype(np.float32) for name, n in (("x", 4), ("s", 6))}
        np.testing.assert_allclose(run(after, **values)["z"], run_in_numpy(before, **values)["z"], rtol=0, atol=1e-5)


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "3x3": {"attributes": "kernel_shape = [3, 3]", "w": RNG.normal(0, 1, (6, 3, 3, 4))},
    "a line": {"attributes": "kernel_shape = [1, 3]", "w": RNG.normal(0, 1, (6, 1, 3, 4))},
    "stride": {"attributes": "kernel_shape = [1, 1], strides = [2, 2]"},
    "padding": {"attributes": "kernel_shape = [1, 1], pads = [1, 1, 1, 1]"},
    "not added to anything": {"end": "z = Neg (y)"},
    "added to a bias alone": {"end": "z = Add (y, b)"},
    "read twice": {"end": "t = Add (s, y) z = Mul (t, y)"},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = convolution(**case)
    before = contents(model)
    assert not PointwiseConvolution()(model).modified
    assert contents(model) == before


def test_everywhere() -> None:
    model = convolution(end="z = Neg (y)")
    assert PointwiseConvolution(everywhere=True)(model).modified
    assert operators(model) == ["MatMul", "Add", "Neg"]


def test_idempotent() -> None:
    model = convolution()
    PointwiseConvolution()(model)
    before = contents(model)
    assert not PointwiseConvolution()(model).modified
    assert contents(model) == before
