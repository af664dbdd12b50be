"""GEGLU before and after one operator does it, in NumPy against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import contents, graph_of, operators, read_by, run

from controlrt.compiler.passes.bias_split_gelu import BiasSplitGelu

X = "float[rows, n, 4] x"
PROJECTION, SPLIT = "p = MatMul (x, m) q = Add (p, b)", "v, g = Split <axis = 2, num_outputs = 2> (q)"
REST = "h = Gelu (g) z = Mul (v, h)"


def geglu(text: str = f"{PROJECTION} {SPLIT} {REST}", width: int = 2560, outputs: str = "", **new: Any) -> ir.Model:
    rng = np.random.default_rng(0)
    constants = {"m": rng.normal(0, 1, (4, width)), "b": rng.normal(0, 1, width)} | new
    return graph_of(X, f"float[rows, n, {width // 2}] z{outputs}", text, **read_by(text, constants))


FIRES: dict[str, dict[str, Any]] = {
    "as the export has it": {},
    "other order of operands": {"text": f"p = MatMul (x, m) q = Add (b, p) {SPLIT} h = Gelu (g) z = Mul (h, v)"},
    "sizes as a constant": {"text": f"{PROJECTION} v, g = Split <axis = -1> (q, s) {REST}", "s": [1280, 1280]},
    "wider": {"width": 5120},
}


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_same_result(case: dict[str, Any]) -> None:
    before, after = geglu(**case), geglu(**case)
    assert BiasSplitGelu()(after).modified
    assert operators(after) == ["MatMul", "BiasSplitGelu"]
    for rows in (1, 2):
        x = np.random.default_rng(rows).normal(0, 1, (rows, 3, 4)).astype(np.float32)
        expected = run(before, x=x)["z"]
        np.testing.assert_allclose(run_in_numpy(after, x=x)["z"], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "a width that the operator does not know": {"width": 2048},
    "approximate GELU": {"text": f'{PROJECTION} {SPLIT} h = Gelu <approximate = "tanh"> (g) z = Mul (v, h)'},
    "GELU of the first half": {"text": f"{PROJECTION} g, v = Split <axis = 2, num_outputs = 2> (q) {REST}"},
    "uneven parts": {
        "text": f"{PROJECTION} v, g, w = Split <axis = 2> (q, s) {REST}",
        "s": [1280, 1280, 0],
    },
    "split of tokens": {
        "text": f"{PROJECTION} v, g = Split <axis = 1, num_outputs = 2> (q) {REST}",
    },
    "no bias": {"text": f"q = MatMul (x, m) {SPLIT} {REST}"},
    "the projection is read elsewhere": {
        "text": f"{PROJECTION} {SPLIT} {REST} o = Neg (q)",
        "outputs": ", float[rows, n, 2560] o",
    },
    "the GELU is read elsewhere": {
        "text": f"{PROJECTION} {SPLIT} {REST} o = Neg (h)",
        "outputs": ", float[rows, n, 1280] o",
    },
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = geglu(**case)
    before = contents(model)
    assert not BiasSplitGelu()(model).modified
    assert contents(model) == before


def test_idempotent() -> None:
    model = geglu()
    BiasSplitGelu()(model)
    before = contents(model)
    assert not BiasSplitGelu()(model).modified
    assert contents(model) == before
