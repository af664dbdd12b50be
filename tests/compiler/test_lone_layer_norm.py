"""Layer norms before and after they are given zeros to add."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import contents, graph_of, operators, read_by, run

from controlrt.compiler.passes.lone_layer_norm import LoneLayerNorm
from controlrt.compiler.standard_form import standard_form

RNG = np.random.default_rng(0)
CONSTANTS: dict[str, Any] = {
    "gamma": RNG.normal(1, 1, 8),
    "beta": RNG.normal(0, 1, 8),
    "m": RNG.normal(0, 1, (8, 8)),
    "w": RNG.normal(0, 1, (8, 1, 1, 8)),
    "b": RNG.normal(0, 1, 8),
    "tokens": [0, 6, 8],
}
NORM = "y = LayerNormalization <epsilon = 0.01> (x, gamma, beta) z = Add (y, x)"
TOKENS, PICTURE = "float[rows, 6, 8] t", "float[rows, 2, 3, 8] p"


def model_of(body: str = "x = Neg (t)", inputs: str = TOKENS, norm: str = NORM, outputs: str = "") -> ir.Model:
    text = f"{body} {norm}"
    size = "n" if "n, 8" in inputs else "6"
    model = graph_of(inputs, f"float[rows, {size}, 8] z{outputs}", text, **read_by(text, CONSTANTS))
    for node in model.graph:  # onnx infers no shape of the provider's operators, nor of what reads them
        for value in node.outputs:
            if value.name in ("c", "x", "y", "z") and value.shape is None:
                value.shape = ir.Shape(["rows", 2, 3, 8] if value.name == "c" else ["rows", 6, 8])
                value.type = ir.TensorType(ir.DataType.FLOAT)
    return model


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "of anything": ({}, ["Neg", "SkipLayerNormalization", "Add"]),
    "of a product with bias": (
        {"body": "u = MatMul (t, m) x = Add (b, u)"},
        ["MatMul", "SkipLayerNormalization", "Add"],
    ),
    "of a picture's convolution with bias": (
        {
            "body": "c = com.microsoft.NhwcConv <kernel_shape = [1, 1]> (p, w, b) x = Reshape (c, tokens)",
            "inputs": PICTURE,
        },
        ["NhwcConv", "Reshape", "SkipLayerNormalization", "Add"],
    ),
    "of a picture's product with bias": (
        {"body": "u = MatMul (p, m) c = Add (u, b) x = Reshape (c, tokens)", "inputs": PICTURE},
        ["MatMul", "Reshape", "SkipLayerNormalization", "Add"],
    ),
    "of a bias that something else reads": (
        {
            "body": "u = MatMul (p, m) c = Add (u, b) x = Reshape (c, tokens) o = Neg (c)",
            "inputs": PICTURE,
            "outputs": ", float[rows, 2, 3, 8] o",
        },
        ["MatMul", "Add", "Reshape", "Neg", "SkipLayerNormalization", "Add"],
    ),
}


def values_of(model: ir.Model, rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(rows)
    return {
        value.name or "": rng.normal(0, 2, [d if isinstance(d, int) else rows for d in value.shape or ()]).astype(
            np.float32
        )
        for value in model.graph.inputs
    }


@pytest.mark.parametrize("case", CASES)
def test_same_result(case: str) -> None:
    options, expected_operators = CASES[case]
    before, after = model_of(**options), model_of(**options)
    assert LoneLayerNorm()(after).modified
    assert operators(after) == expected_operators
    for rows in (1, 3):
        values = values_of(before, rows)
        expected = run(standard_form(before), **values)
        for found in (run(standard_form(after), **values), run_in_numpy(after, **values)):
            assert set(found) == set(expected)
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, rtol=0, atol=5e-6 * np.abs(array).max())


def test_the_cpu_broadcasts_the_zeros_too() -> None:
    before, after = model_of(), model_of()
    LoneLayerNorm()(after)
    values = values_of(before, 3)
    np.testing.assert_allclose(run(after, **values)["z"], run(before, **values)["z"], rtol=0, atol=1e-5)


def test_norms_of_one_size_share_zeros() -> None:
    model = model_of(norm=f"{NORM.replace('z = ', 'v = ')} z = LayerNormalization (v, gamma, beta)")
    LoneLayerNorm()(model)
    zeros = [node.inputs[1] for node in model.graph if node.op_type == "SkipLayerNormalization"]
    assert len(zeros) == 2
    assert zeros[0] is zeros[1]


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "of tokens whose number is not known": {"inputs": "float[rows, n, 8] t"},
    "over tokens as well": {"norm": "y = LayerNormalization <axis = 1> (x, t6) z = Add (y, x)", "inputs": TOKENS},
    "no bias of its own": {"norm": "y = LayerNormalization (x, gamma) z = Add (y, x)"},
    "its mean is read": {
        "norm": "y, o = LayerNormalization (x, gamma, beta) z = Add (y, x)",
        "outputs": ", float[rows, 6, 1] o",
    },
    "its value is an output": {"outputs": ", float[rows, 6, 8] x"},
}
NEAR_MISSES["over tokens as well"]["inputs"] = f"{TOKENS}, float[6, 8] t6"


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = model_of(**case)
    before = contents(model)
    assert not LoneLayerNorm()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("case", CASES)
def test_idempotent(case: str) -> None:
    model = model_of(**CASES[case][0])
    LoneLayerNorm()(model)
    before = contents(model)
    assert not LoneLayerNorm()(model).modified
    assert contents(model) == before
