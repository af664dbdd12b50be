"""Layer norms of sums before and after they add themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import contents, graph_of, operators, read_by, run

from controlrt.compiler.passes.skip_layer_norm import SkipLayerNorm
from controlrt.compiler.standard_form import standard_form

RNG = np.random.default_rng(0)
TOKENS = "float[rows, n, 8]"
NORM = "LayerNormalization <epsilon = 0.01> (t, gamma, beta)"
CONSTANTS: dict[str, Any] = {
    "gamma": RNG.normal(1, 1, 8),
    "beta": RNG.normal(0, 1, 8),
    "m": RNG.normal(0, 1, (8, 8)),
    "k": RNG.normal(0, 1, (8, 8)),
    "b": RNG.normal(0, 1, 8),
    "c": RNG.normal(0, 1, 8),
}
A, S = f"{TOKENS} a", f"{TOKENS} s"


def model_of(
    body: str, inputs: str = f"{A}, {S}", outputs: str = f"{TOKENS} y", end: str = "", norm: str = f"y = {NORM}"
) -> ir.Model:
    text = f"{body} {norm} {end}"
    return graph_of(inputs, outputs, text, **read_by(text, CONSTANTS))


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "two values": ({"body": "t = Add (a, s)"}, ["SkipLayerNormalization"]),
    "the sum is read elsewhere": (
        {"body": "t = Add (a, s)", "outputs": f"{TOKENS} y, {TOKENS} z", "end": "z = Neg (t)"},
        ["SkipLayerNormalization", "Neg"],
    ),
    "a product's bias": (
        {"body": "u = MatMul (a, m) p = Add (u, b) t = Add (s, p)"},
        ["MatMul", "SkipLayerNormalization"],
    ),
    "two products' biases": (
        {"body": "u = MatMul (a, m) p = Add (u, b) v = MatMul (s, k) q = Add (c, v) t = Add (p, q)"},
        ["MatMul", "MatMul", "SkipLayerNormalization"],
    ),
    "a bias that is read elsewhere": (
        {
            "body": "u = MatMul (a, m) p = Add (u, b) t = Add (s, p)",
            "outputs": f"{TOKENS} y, {TOKENS} z",
            "end": "z = Neg (p)",
        },
        ["MatMul", "Add", "SkipLayerNormalization", "Neg"],
    ),
    "axis from the front": (
        {"body": "t = Add (a, s)", "norm": "y = LayerNormalization <axis = 2> (t, gamma, beta)"},
        ["SkipLayerNormalization"],
    ),
}


def values_of(rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(rows)
    return {name: rng.normal(0, 2, (rows, 5, 8)).astype(np.float32) for name in "as"}


@pytest.mark.parametrize("case", CASES)
def test_same_result(case: str) -> None:
    options, expected_operators = CASES[case]
    before, after = (model_of(**options) for _ in range(2))
    assert SkipLayerNorm()(after).modified
    assert operators(after) == expected_operators
    for rows in (1, 3):
        values = values_of(rows)
        expected = run(before, **values)
        for found in (run(after, **values), run(standard_form(after), **values), run_in_numpy(after, **values)):
            assert set(found) == set(expected)
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, rtol=0, atol=5e-6 * np.abs(array).max())


NEAR_MISSES = {
    "no sum": {"body": "t = Neg (a)", "inputs": A},
    "the sum of a value and itself": {"body": "t = Add (a, a)", "inputs": A},
    "a sum with a bias alone": {"body": "t = Add (a, b)", "inputs": A},
    "one value for all rows": {"body": "t = Add (a, s)", "inputs": f"{A}, float[1, n, 8] s"},
    "over tokens as well": {"body": "t = Add (a, s)", "norm": "y = LayerNormalization <axis = 1> (t, gamma)"},
    "no bias of its own": {"body": "t = Add (a, s)", "norm": "y = LayerNormalization (t, gamma)"},
    "its mean is read": {
        "body": "t = Add (a, s)",
        "norm": "y, z = LayerNormalization (t, gamma, beta)",
        "outputs": f"{TOKENS} y, float[rows, n, 1] z",
    },
    "the sum is an output": {"body": "t = Add (a, s)", "outputs": f"{TOKENS} y, {TOKENS} t"},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = model_of(**case)
    before = contents(model)
    assert not SkipLayerNorm()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("case", CASES)
def test_idempotent(case: str) -> None:
    model = model_of(**CASES[case][0])
    SkipLayerNorm()(model)
    before = contents(model)
    assert not SkipLayerNorm()(model).modified
    assert contents(model) == before
