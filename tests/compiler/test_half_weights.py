"""Weights stored in float16, against rounding them by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import contents, feed, graph_of, session

from controlrt.compiler.passes.half_weights import HalfWeights

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 64)).astype(np.float32)
W = RNG.standard_normal((64, 32)).astype(np.float32)


def linear(**weights: Any) -> ir.Model:
    return graph_of("float[3, 64] x", "float[3, 32] y", "p = MatMul (x, w) y = Add (p, b)", **weights)


def test_products_are_of_the_rounded_weights() -> None:
    bias = RNG.standard_normal(32).astype(np.float32)
    model = linear(w=W, b=bias)
    assert HalfWeights()(model).modified
    found = feed(session(model), {"x": X})["y"]
    np.testing.assert_allclose(found, X @ W.astype(np.float16).astype(np.float32) + bias, rtol=1e-5, atol=1e-5)
    assert {name: value.dtype for name, value in model.graph.initializers.items()} == {
        "w.half": ir.DataType.FLOAT16,
        "b": ir.DataType.FLOAT,
    }
    assert not HalfWeights()(model).modified


@pytest.mark.parametrize("factor", [1e6, 1e-9, 0.0])
def test_what_float16_does_not_hold_stays(factor: float) -> None:
    model = linear(w=(W * factor).astype(np.float32), b=np.zeros(32))
    before = contents(model)
    assert not HalfWeights()(model).modified
    assert contents(model) == before
