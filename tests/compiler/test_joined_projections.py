"""Self-attention before and after its projections are one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import contents, graph_of, operators, read_by, run

from controlrt.compiler.passes.joined_projections import MAX_TOKENS, JoinedProjections

RNG = np.random.default_rng(0)
CONSTANTS: dict[str, Any] = {name: RNG.normal(0, 1, (8, 6)) for name in "abc"} | {"d": RNG.normal(0, 1, (8, 12))}
PROJECTIONS = "q = MatMul (x, a) k = MatMul (x, b) v = MatMul (x, c)"
ATTENTION = "y = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, v) z = Neg (y)"


def attention(
    text: str = f"{PROJECTIONS} {ATTENTION}", outputs: str = "", inputs: str = "", tokens: int | str = 5
) -> ir.Model:
    declared = f"float[rows, {tokens}, 8] x{inputs}", f"float[rows, {tokens}, 6] z{outputs}"
    return graph_of(*(each.replace("n,", f"{tokens},") for each in declared), text, **read_by(text, CONSTANTS))


@pytest.mark.parametrize("rows", [1, 3])
def test_same_result(rows: int) -> None:
    before, after = attention(), attention()
    assert JoinedProjections()(after).modified
    assert operators(after) == ["MatMul", "Split", "MultiHeadAttention", "Neg"]
    x = np.random.default_rng(rows).normal(0, 1, (rows, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(run(after, x=x)["z"], run(before, x=x)["z"], rtol=0, atol=3e-6)


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "many tokens": {"tokens": MAX_TOKENS + 1},
    "nobody knows how many tokens": {"tokens": "n"},
    "keys of something else": {
        "text": f"q = MatMul (x, a) k = MatMul (t, b) v = MatMul (t, c) {ATTENTION}",
        "inputs": ", float[rows, n, 8] t",
    },
    "weights that are computed": {
        "text": f"q = MatMul (x, a) k = MatMul (x, w) v = MatMul (x, c) {ATTENTION}",
        "inputs": ", float[8, 6] w",
    },
    "a projection that is read elsewhere": {
        "text": f"{PROJECTIONS} {ATTENTION} o = Neg (k)",
        "outputs": ", float[rows, n, 6] o",
    },
    "one projection for two": {
        "text": "q = MatMul (x, a) k = MatMul (x, b) y = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, k) "
        "z = Neg (y)"
    },
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = attention(**case)
    before = contents(model)
    assert not JoinedProjections()(model).modified
    assert contents(model) == before


def test_idempotent() -> None:
    model = attention()
    JoinedProjections()(model)
    before = contents(model)
    assert not JoinedProjections()(model).modified
    assert contents(model) == before
