"""Biases and residuals before and after they are added at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import contents, graph_of, operators, read_by, run

from controlrt.compiler.passes.bias_add import BiasAdd

SUM = "p = MatMul (x, m) q = Add (p, b)"
TOKENS, PICTURE = "rows, n", "rows, 2, 3"


def model_of(
    text: str = f"{SUM} z = Add (q, s)", sides: str = "rows, 6", channels: int = 320, outputs: str = "", **new: Any
) -> ir.Model:
    rng = np.random.default_rng(0)
    constants = {"m": rng.normal(0, 1, (4, channels)), "b": rng.normal(0, 1, channels)} | new
    inputs = f"float[{sides}, 4] x, float[{new.pop('skip', f'{sides}, {channels}')}] s"
    constants.pop("skip", None)
    return graph_of(inputs, f"float[{sides}, {channels}] z{outputs}", text, **read_by(text, constants))


FIRES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "tokens": ({}, ["MatMul", "BiasAdd"]),
    "other order": ({"text": "p = MatMul (x, m) q = Add (b, p) z = Add (s, q)"}, ["MatMul", "BiasAdd"]),
    "wider": ({"channels": 1280}, ["MatMul", "BiasAdd"]),
    "a picture": ({"sides": PICTURE}, ["MatMul", "Reshape", "Reshape", "BiasAdd", "Reshape"]),
}


@pytest.mark.parametrize("case", FIRES)
def test_same_result(case: str) -> None:
    options, expected_operators = FIRES[case]
    before, after = model_of(**options), model_of(**options)
    assert BiasAdd()(after).modified
    assert operators(after) == expected_operators
    for rows in (1, 2):
        rng = np.random.default_rng(rows)
        shapes = {v.name or "": [d if isinstance(d, int) else rows for d in v.shape or ()] for v in before.graph.inputs}
        values = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
        expected = run(before, **values)["z"]
        np.testing.assert_allclose(run_in_numpy(after, **values)["z"], expected, rtol=0, atol=1e-5)


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "channels that the operator does not know": {"channels": 512},
    "no bias": {"text": "q = MatMul (x, m) z = Add (q, s)"},
    "no product": {"text": "p = Neg (s) q = Add (p, b) z = Add (q, s)"},
    "one residual for all rows": {"skip": "1, 6, 320"},
    "the sum is read elsewhere": {
        "text": f"{SUM} z = Add (q, s) o = Neg (q)",
        "outputs": ", float[rows, 6, 320] o",
    },
    "a picture whose sides are not known": {"sides": "rows, h, w"},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = model_of(**case)
    before = contents(model)
    assert not BiasAdd()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("case", FIRES)
def test_idempotent(case: str) -> None:
    model = model_of(**FIRES[case][0])
    BiasAdd()(model)
    before = contents(model)
    assert not BiasAdd()(model).modified
    assert contents(model) == before
