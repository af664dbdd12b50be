"""Group norms of sums before and after they add themselves, in NumPy against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import contents, graph_of, operators, read_by, run

from controlrt.compiler.passes.skip_group_norm import SkipGroupNorm
from controlrt.compiler.standard_form import standard_form

RNG = np.random.default_rng(0)
PICTURE = "float[rows, 5, 6, 8]"
NORM = "com.microsoft.GroupNorm <groups = 2, epsilon = 0.01, activation = 1, channels_last = 1> (t, gamma, beta)"
CONSTANTS: dict[str, Any] = {
    "gamma": RNG.normal(1, 1, 8),
    "beta": RNG.normal(0, 1, 8),
    "w": RNG.normal(0, 1, (8, 1, 1, 8)),
    "v": RNG.normal(0, 1, (8, 1, 1, 8)),
    "m": RNG.normal(0, 1, (8, 8)),
    "b": RNG.normal(0, 1, 8),
    "c": RNG.normal(0, 1, 8),
    "one": [1],
    "sides": [1, 2],
    "last": [2, 3],
}
CONV = "com.microsoft.NhwcConv <kernel_shape = [1, 1]>"


def model_of(body: str, inputs: str, outputs: str = f"{PICTURE} y", end: str = "") -> ir.Model:
    text = f"{body} y = {NORM} {end}"
    model = graph_of(inputs, outputs, text, **read_by(text, CONSTANTS))
    shapes = {"u": [5, 6, 8], "p": [5, 6, 8], "q": [5, 6, 8], "t": [5, 6, 8], "y": [5, 6, 8]}
    for node in model.graph:  # onnx infers no shape of the provider's operators, nor of what reads them
        for value in node.outputs:
            if value.name in shapes:
                value.shape = ir.Shape([ir.SymbolicDim("rows"), *shapes[value.name]])
                value.type = ir.TensorType(ir.DataType.FLOAT)
    return model


A, S, E = f"{PICTURE} a", f"{PICTURE} s", "float[rows, 8] e"
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "two pictures": ({"body": "t = Add (a, s)", "inputs": f"{A}, {S}"}, ["SkipGroupNorm"]),
    "the sum is read elsewhere": (
        {
            "body": "t = Add (a, s)",
            "inputs": f"{A}, {S}",
            "outputs": f"{PICTURE} y, {PICTURE} z",
            "end": "z = Neg (t)",
        },
        ["SkipGroupNorm", "Neg"],
    ),
    "a convolution's bias": (
        {"body": f"p = {CONV} (a, w, b) t = Add (s, p)", "inputs": f"{A}, {S}"},
        ["NhwcConv", "SkipGroupNorm"],
    ),
    "two convolutions' biases": (
        {"body": f"p = {CONV} (a, w, b) q = {CONV} (s, v, c) t = Add (p, q)", "inputs": f"{A}, {S}"},
        ["NhwcConv", "NhwcConv", "SkipGroupNorm"],
    ),
    "a product's bias": (
        {"body": "u = MatMul (a, m) p = Add (b, u) t = Add (p, s)", "inputs": f"{A}, {S}"},
        ["MatMul", "SkipGroupNorm"],
    ),
    "a bias that is read elsewhere": (
        {
            "body": f"p = {CONV} (a, w, b) t = Add (s, p)",
            "inputs": f"{A}, {S}",
            "outputs": f"{PICTURE} y, {PICTURE} z",
            "end": "z = Neg (p)",
        },
        ["NhwcConv", "SkipGroupNorm", "Neg"],
    ),
    "one value for each row and channel": (
        {"body": "e4 = Unsqueeze (e, sides) t = Add (a, e4)", "inputs": f"{A}, {E}"},
        ["SkipGroupNorm"],
    ),
    "its sides last first": (
        {
            "body": "e4 = Unsqueeze (e, last) e5 = Transpose <perm = [0, 2, 3, 1]> (e4) t = Add (e5, a)",
            "inputs": f"{A}, {E}",
        },
        ["SkipGroupNorm"],
    ),
    "of pictures, expanded to rows": (
        {
            "body": "e4 = Unsqueeze (e, sides) g = Gather <axis = 0> (e4, i) t = Add (a, g)",
            "inputs": f"{A}, float[batch, 8] e, int64[rows] i",
        },
        ["Gather", "SkipGroupNorm"],
    ),
    "nothing known of where it comes from": (
        {"body": "t = Add (a, e)", "inputs": f"{A}, float[rows, 1, 1, 8] e"},
        ["Reshape", "SkipGroupNorm"],
    ),
}


def values_of(model: ir.Model, rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(rows)
    sizes = {"rows": rows, "batch": 1}
    shapes = {v.name: [d if isinstance(d, int) else sizes[str(d)] for d in v.shape or ()] for v in model.graph.inputs}
    values: dict[str, Any] = {name or "": rng.normal(0, 2, shape).astype(np.float32) for name, shape in shapes.items()}
    return values | {"i": np.zeros(rows, np.int64)}


@pytest.mark.parametrize("case", CASES)
def test_same_result(case: str) -> None:
    options, expected_operators = CASES[case]
    before, after = (model_of(**options) for _ in range(2))
    assert SkipGroupNorm()(after).modified
    assert operators(after) == expected_operators
    for rows in (1, 3):
        values = values_of(before, rows)
        found, expected = run_in_numpy(after, **values), run(standard_form(before), **values)
        assert set(found) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=5e-6 * np.abs(array).max())


NEAR_MISSES = {
    "no sum": {"body": "t = Neg (a)", "inputs": A},
    "the sum of a picture and itself": {"body": "t = Add (a, a)", "inputs": A},
    "a sum with a bias alone": {"body": "t = Add (a, b)", "inputs": A},
    "one value for each pixel": {"body": "t = Add (a, s)", "inputs": f"{A}, float[rows, 5, 6, 1] s"},
    "one picture for all rows": {"body": "t = Add (a, s)", "inputs": f"{A}, float[1, 5, 6, 8] s"},
    "one value for each channel of all rows": {"body": "t = Add (a, s)", "inputs": f"{A}, float[1, 1, 1, 8] s"},
    "the sum is an output": {
        "body": "t = Add (a, s)",
        "inputs": f"{A}, {S}",
        "outputs": f"{PICTURE} y, {PICTURE} t",
    },
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = model_of(**case)
    before = contents(model)
    assert not SkipGroupNorm()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("case", CASES)
def test_idempotent(case: str) -> None:
    model = model_of(**CASES[case][0])
    SkipGroupNorm()(model)
    before = contents(model)
    assert not SkipGroupNorm()(model).modified
    assert contents(model) == before
