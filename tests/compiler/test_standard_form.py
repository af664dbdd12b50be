"""Operators of the CUDA provider in standard form, against NumPy and against those that ONNX Runtime's CPU has."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import graph_of, operators, read_by, run
from numpy.typing import NDArray

from controlrt.compiler.flops import count_flops
from controlrt.compiler.standard_form import standard_form

PICTURE = "float[rows, 6, 8, 12] x"
NORM = "groups = 3, epsilon = 0.001, channels_last = 1, activation"
RNG = np.random.default_rng(0)
AFFINE = {"gamma": RNG.normal(1, 1, 12), "beta": RNG.normal(0, 1, 12), "bias": RNG.normal(0, 1, 12)}
KERNEL = {"w": RNG.normal(0, 1, (5, 3, 3, 12)), "b": RNG.normal(0, 1, 5)}
CONV = "kernel_shape = [3, 3]"

CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "NhwcConv": (
        PICTURE,
        "float[rows, 6, 8, 5] y",
        f"y = com.microsoft.NhwcConv <{CONV}, pads = [1, 1, 1, 1]> (x, w)",
        KERNEL,
    ),
    "NhwcConv with stride, uneven padding and bias": (
        PICTURE,
        "float[rows, 3, 4, 5] y",
        f"y = com.microsoft.NhwcConv <{CONV}, pads = [0, 0, 1, 1], strides = [2, 2]> (x, w, b)",
        KERNEL,
    ),
    "GroupNorm": (
        PICTURE,
        "float[rows, 6, 8, 12] y",
        f"y = com.microsoft.GroupNorm <{NORM} = 0> (x, gamma, beta)",
        AFFINE,
    ),
    "GroupNorm with SiLU": (
        PICTURE,
        "float[rows, 6, 8, 12] y",
        f"y = com.microsoft.GroupNorm <{NORM} = 1> (x, gamma, beta)",
        AFFINE,
    ),
    "SkipGroupNorm": (
        f"{PICTURE}, float[rows, 6, 8, 12] s",
        "float[rows, 6, 8, 12] y, float[rows, 6, 8, 12] total",
        f"y, total = com.microsoft.SkipGroupNorm <{NORM} = 1> (x, gamma, beta, s, bias)",
        AFFINE,
    ),
    "SkipGroupNorm of one value per row and channel": (
        f"{PICTURE}, float[rows, 12] s",
        "float[rows, 6, 8, 12] y",
        f"y = com.microsoft.SkipGroupNorm <{NORM} = 0> (x, gamma, beta, s)",
        AFFINE,
    ),
    "SkipLayerNormalization": (
        "float[rows, n, 12] x, float[rows, n, 12] s",
        "float[rows, n, 12] y, float[rows, n, 12] total",
        "y, , , total = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (x, s, gamma, beta, bias)",
        AFFINE,
    ),
    "SkipLayerNormalization without bias": (
        "float[rows, n, 12] x, float[rows, n, 12] s",
        "float[rows, n, 12] y",
        "y = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (x, s, gamma, beta)",
        AFFINE,
    ),
    "BiasSplitGelu": (
        "float[rows, n, 12] x",
        "float[rows, n, 6] y",
        "y = com.microsoft.BiasSplitGelu (x, bias)",
        AFFINE,
    ),
    "BiasAdd": (
        "float[rows, n, 12] x, float[rows, n, 12] s",
        "float[rows, n, 12] y",
        "y = com.microsoft.BiasAdd (x, bias, s)",
        AFFINE,
    ),
}


def model_of(case: str, kind: str = "float") -> ir.Model:
    inputs, outputs, body, constants = CASES[case]
    inputs, outputs = (text.replace("float[", f"{kind}[") for text in (inputs, outputs))
    return graph_of(inputs, outputs, body, infer=False, **read_by(body, constants))


def operands(model: ir.Model, rows: int, tokens: int = 5) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(rows)
    sizes = {"rows": rows, "n": tokens}
    return {
        value.name or "": rng.normal(1, 2, [d if isinstance(d, int) else sizes[str(d)] for d in value.shape or ()])
        .astype(np.float32)
        .copy()
        for value in model.graph.inputs
    }


@pytest.mark.parametrize("case", CASES)
def test_like_numpy(case: str) -> None:
    before = model_of(case)
    after = standard_form(before)
    assert not [node for node in after.graph if node.domain]
    assert [node.domain for node in before.graph] == ["com.microsoft"]
    for rows in (1, 3):
        values = operands(before, rows)
        expected = run_in_numpy(before, **values)
        found = run(after, **values)
        assert set(found) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=3e-6 * np.abs(array).max())


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("SkipLayer")])
def test_numpy_is_like_onnx_runtime(case: str) -> None:
    """The one operator of these that the CPU has as well."""
    model = model_of(case)
    values = operands(model, 2)
    expected = run(model, **values)
    for name, array in run_in_numpy(model, **values).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=3e-6 * np.abs(array).max())


def test_float16_pictures_are_normalized_in_float32() -> None:
    model = model_of("GroupNorm with SiLU", "float16")
    # squares of these leave the range of float16
    x = np.random.default_rng(0).normal(300, 20, (2, 6, 8, 12)).astype(np.float16)
    expected = run_in_numpy(model, x=x)["y"]
    found = run(standard_form(model), x=x)["y"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_several_of_one_kind() -> None:
    model = graph_of(
        "float[rows, n, 12] x",
        "float[rows, n, 3] y",
        "t = com.microsoft.BiasSplitGelu (x, bias) y = com.microsoft.BiasSplitGelu (t, half)",
        infer=False,
        bias=AFFINE["bias"],
        half=AFFINE["bias"][:6],
    )
    values = operands(model, 2)
    np.testing.assert_allclose(
        run(standard_form(model), **values)["y"], run_in_numpy(model, **values)["y"], rtol=1e-5, atol=1e-5
    )


def test_what_has_no_such_operator_is_left_as_it_is() -> None:
    model = graph_of("float[n, 12] x", "float[n, 12] y", "y = Neg (x)")
    assert standard_form(model) is model
    assert operators(model) == ["Neg"]


def test_flops() -> None:
    model = standard_form(model_of("NhwcConv"))
    assert count_flops(model.graph, {"rows": 2}).total == 2 * 2 * 6 * 8 * 5 * 9 * 12
