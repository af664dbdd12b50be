"""Attention before and after it is given to CUDA's fused kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import contents, graph_of, operators, run

from controlrt.compiler.passes.fused_attention import FusedAttention

HEADS = "q_num_heads = 3, kv_num_heads = 3"
QKV = "float[rows, n, 24] q, float[rows, m, 24] k, float[rows, m, 24] v"


def attention(attributes: str = HEADS, inputs: str = QKV, body: str = "y = Attention <{}> (q, k, v)") -> ir.Model:
    """Attention of q, k and v."""
    kind = inputs.partition("[")[0]
    return graph_of(inputs, f"{kind}[rows, n, c] z", f"{body.replace('{}', attributes)} z = Neg (y)")


@pytest.mark.parametrize("attributes", [HEADS, f"{HEADS}, scale = 0.3", f"{HEADS}, softmax_precision = 1"])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_same_result(attributes: str, kind: str) -> None:
    before, after = (attention(attributes, QKV.replace("float", kind)) for _ in range(2))
    assert FusedAttention()(after).modified
    assert operators(after) == ["MultiHeadAttention", "Neg"]
    rng = np.random.default_rng(0)
    dtype, exact = (np.float32, 2e-6) if kind == "float" else (np.float16, 2e-3)
    values = {name: rng.normal(0, 1, (2, 7 if name == "q" else 9, 24)).astype(dtype) for name in "qkv"}
    expected = run(before, **values)["z"]
    for found in (run_in_numpy(after, **values)["z"], run(after, **values)["z"] if kind == "float" else expected):
        assert found.dtype == dtype
        np.testing.assert_allclose(
            found.astype(np.float32), expected.astype(np.float32), rtol=0, atol=exact * np.abs(expected).max()
        )


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "causal": {"attributes": f"{HEADS}, is_causal = 1"},
    "capped scores": {"attributes": f"{HEADS}, softcap = 5.0"},
    "fewer heads of keys": {
        "attributes": "q_num_heads = 3, kv_num_heads = 1",
        "inputs": "float[rows, n, 24] q, float[rows, m, 8] k, float[rows, m, 8] v",
    },
    "split into heads": {
        "attributes": "scale = 0.5",
        "inputs": "float[rows, 3, n, 8] q, float[rows, 3, m, 8] k, float[rows, 3, m, 8] v",
    },
    "width of a head not a multiple of 8": {"inputs": QKV.replace("24", "12")},
    "width of a head not known": {"inputs": QKV.replace("24", "c")},
    "in double": {"inputs": QKV.replace("float", "double")},
    "mask": {
        "inputs": f"{QKV}, float[n, m] mask",
        "body": "y = Attention <{}> (q, k, v, mask)",
    },
    "too wide a head": {"inputs": QKV.replace("24", "3096")},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = attention(**case)
    before = contents(model)
    assert not FusedAttention()(model).modified
    assert contents(model) == before


def test_softmax_precision_goes_where_attention_stays() -> None:
    attributes = f"{HEADS}, is_causal = 1, softmax_precision"
    model = attention(f"{attributes} = 1", QKV.replace("float", "float16"))
    assert FusedAttention()(model).modified
    assert operators(model) == ["Attention", "Neg"]
    assert "softmax_precision" not in next(iter(model.graph)).attributes
    assert "com.microsoft" in model.graph.opset_imports
    assert not FusedAttention()(model).modified


def test_idempotent() -> None:
    model = attention()
    FusedAttention()(model)
    before = contents(model)
    assert not FusedAttention()(model).modified
    assert contents(model) == before
