"""Attention before and after its heads go into the operator, in ONNX Runtime and against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import contents, feed, graph_of, operators, run, session
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from controlrt.compiler.compile import load_program
from controlrt.compiler.passes.attention_layout import AttentionLayout
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.profile import ShapeProfile

HEADS, WIDTH, VALUE_WIDTH = 3, 4, 5
CHANNELS, VALUE_CHANNELS = HEADS * WIDTH, HEADS * VALUE_WIDTH

SPLIT = """
    {x}_r = Reshape ({x}, {x}_split)
    {x}_h = Transpose <perm = [0, 2, 1, 3]> ({x}_r)"""
QUERY, KEY, VALUE = (SPLIT.replace("{x}", name) for name in "qkv")
ATTEND = "a = Attention (q_h, k_h, v_h)"
JOIN = "a_t = Transpose <perm = [0, 2, 1, 3]> (a) y = Reshape (a_t, joined)"
DEFAULT = {"query": QUERY, "key": KEY, "value": VALUE, "attend": ATTEND, "join": JOIN, "end": "z = Neg (y)"}


def attention(
    outputs: str = "float[rows, n, 15] z",
    constants: dict[str, list[int]] | None = None,
    inputs: str = "",
    **parts: str,
) -> ir.Model:
    """The pattern, with ``parts`` of it in place of the usual ones; q, k and v are the inputs."""
    body = " ".join({**DEFAULT, **parts}.values())
    known = {
        "q_split": [0, 0, HEADS, WIDTH],
        "k_split": [0, 0, HEADS, WIDTH],
        "v_split": [0, 0, HEADS, VALUE_WIDTH],
        "joined": [0, 0, VALUE_CHANNELS],
        "ends": [0],
        "last": [2**31],
        "token_axis": [1],
    } | (constants or {})
    return graph_of(
        f"float[rows, n, 12] q, float[rows, m, 12] k, float[rows, m, 15] v{inputs}",
        outputs,
        body,
        **{name: np.array(value) for name, value in known.items() if name in body},
    )


def operands(rows: int, queries: int, keys: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (rows, queries, CHANNELS), "k": (rows, keys, CHANNELS), "v": (rows, keys, VALUE_CHANNELS)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def assert_same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    # the same products in another layout: ONNX Runtime may add them in another order, each sum rounded to 2^-24
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


FIRES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"attend": "a = Attention <scale = 0.3> (q_h, k_h, v_h)"},
    "causal": {"attend": "a = Attention <is_causal = 1> (q_h, k_h, v_h)"},
    "one value for key and query": {
        "query": "",
        "attend": "a = Attention (k_h, k_h, v_h)",
        "end": "z = Neg (y)",
        "outputs": "float[rows, m, 15] z",
    },
    "the result is read twice": {"end": "w = Neg (y) z = Mul (w, y)"},
}


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_same_result(case: dict[str, Any]) -> None:
    before, after = attention(**case), attention(**case)
    assert AttentionLayout()(after).modified
    assert not {"Reshape", "Transpose"} & set(operators(after))
    (node,) = (node for node in after.graph if node.op_type == "Attention")
    assert (node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)) == (HEADS, HEADS)
    first, second = session(before), session(after)
    for rows, queries, keys in ((1, 1, 1), (2, 7, 7), (3, 5, 9)):
        values = operands(rows, queries, keys)
        assert_same(feed(second, values)["z"], feed(first, values)["z"])


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), queries=st.integers(1, 20), keys=st.integers(1, 20), seed=st.integers(0, 99))
def test_like_pytorch(rows: int, queries: int, keys: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    model = attention()
    AttentionLayout()(model)
    values = operands(rows, queries, keys, seed)
    q, k, v = (torch.from_numpy(values[name]).unflatten(2, (HEADS, -1)).transpose(1, 2) for name in "qkv")
    expected = -torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).numpy()
    assert_same(run(model, **values)["z"], expected)


def test_what_is_recorded() -> None:
    model = attention()
    AttentionLayout()(model)
    assert operators(model) == ["Attention", "Neg"]
    (node, _) = model.graph
    assert [value.name for value in node.inputs[:3]] == ["q", "k", "v"]
    assert node.outputs[0].shape is not None
    assert node.outputs[0].shape == ir.Shape(["rows", "n", VALUE_CHANNELS])


WINDOWED = (("query", "q", QUERY), ("key", "k", KEY), ("value", "v", VALUE))
NEAR_MISSES: dict[str, dict[str, Any]] = {
    "another order of axes": {
        "query": QUERY.replace("[0, 2, 1, 3]", "[0, 2, 3, 1]"),
        "constants": {"q_split": [0, 4, 3, -1]},
    },
    "query not split": {
        "query": "q_h = Relu (q4)",
        "inputs": ", float[rows, 3, n, 4] q4",
    },
    "query not from a reshape": {
        "query": "q_h = Transpose <perm = [0, 2, 1, 3]> (q4)",
        "inputs": ", float[rows, n, 3, 4] q4",
    },
    "key split of tokens": {
        "key": KEY.replace("(k,", "(k4,"),
        "inputs": ", float[rows, m, 2, 6] k4",
    },
    "windows of tokens": {
        **{part: text.replace(f"({name},", f"({name}8,") for part, name, text in WINDOWED},
        "inputs": ", float[rows, 8, 12] q8, float[rows, 8, 12] k8, float[rows, 8, 15] v8",
        "outputs": "float[rows, 8, 15] z",
        "constants": {
            "q_split": [-1, 4, HEADS, WIDTH],
            "k_split": [-1, 4, HEADS, WIDTH],
            "v_split": [-1, 4, HEADS, VALUE_WIDTH],
            "joined": [-1, 8, VALUE_CHANNELS],
        },
    },
    "heads from rows": {
        "value": VALUE.replace("(v,", "(wide,"),
        "inputs": ", float[half, m, 30] wide",
        "constants": {"v_split": [-1, 6, HEADS, VALUE_WIDTH]},
    },
    "fewer heads of keys": {
        "key": KEY.replace("(k,", "(k1,"),
        "inputs": ", float[rows, m, 4] k1",
        "constants": {"k_split": [0, 0, 1, WIDTH]},
    },
    "mask": {
        "attend": "a = Attention (q_h, k_h, v_h, mask)",
        "inputs": ", float[n, m] mask",
    },
    "scores are read": {
        "attend": "a, past_k, past_v, scores = Attention (q_h, k_h, v_h) s = ReduceSum <keepdims = 0> (scores)",
        "end": "z = Mul (y, s)",
    },
    "result is read as heads": {"end": "s = ReduceSum <keepdims = 0> (a) z = Mul (y, s)"},
    "transposed result is read": {"end": "s = ReduceSum <keepdims = 0> (a_t) z = Mul (y, s)"},
    "result is not joined": {"join": "y = Transpose <perm = [0, 2, 1, 3]> (a)", "outputs": "float[rows, n, 3, 5] z"},
    "result joined otherwise": {"join": JOIN.replace("[0, 2, 1, 3]", "[0, 1, 2, 3]")},
    "result joined to tokens": {
        "constants": {"joined": [0, -1, VALUE_WIDTH]},
        "outputs": "float[rows, k, 5] z",
    },
    "result is the output": {"end": "", "outputs": "float[rows, n, 15] y"},
    "heads are an output": {"end": "z = Neg (y)", "outputs": "float[rows, n, 15] z, float[rows, 3, n, 5] a"},
    "operator of another domain": {"attend": "a = local.Attention (q_h, k_h, v_h)"},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = attention(**case)
    before = contents(model)
    assert not AttentionLayout()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_second_time(case: dict[str, Any]) -> None:
    model = attention(**case)
    AttentionLayout()(model)
    before = contents(model)
    assert not AttentionLayout()(model).modified
    assert contents(model) == before


def test_diffusers_attention() -> None:
    """Self- and cross-attention as diffusers writes them, traced for any number of rows."""
    torch = pytest.importorskip("torch")
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    module = Attention(query_dim=16, cross_attention_dim=12, heads=4, dim_head=4).eval()
    rows = torch.export.Dim("rows", min=1, max=8)
    program = torch.onnx.export(
        module,
        (torch.randn(3, 10, 16), torch.randn(3, 7, 12)),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=({0: rows}, {0: rows}),
        verbose=False,
    )
    model = program.model
    assert AttentionLayout()(model).modified
    assert "Transpose" not in [
        node.op_type for node in model.graph if node.outputs[0].shape is not None and len(node.outputs[0].shape) == 4
    ]
    names = [value.name for value in model.graph.inputs]
    for count in (1, 2, 5):
        x, context = torch.randn(count, 10, 16), torch.randn(count, 7, 12)
        expected = module(x, context).detach().numpy()
        (found,) = run(model, **dict(zip(names, (x.numpy(), context.numpy()), strict=True))).values()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"], indirect=True, scope="module")
@pytest.mark.parametrize("name", ["unet", "controlnet.first"])
def test_every_attention_of_traced_steps(exported: Path, name: str) -> None:
    profile = ShapeProfile.parse("128x128", "1-4")
    program = next(program for program in read_manifest(exported).programs if program.name == name)
    before, after = (load_program(program, exported, profile) for _ in range(2))
    AttentionLayout()(after)
    nodes = [node for node in after.graph if node.op_type == "Attention"]
    assert len(nodes) >= 4
    assert all(node.attributes.get_int("q_num_heads", 0) for node in nodes)
    saved = operators(before).count("Transpose") - operators(after).count("Transpose")
    assert saved == 4 * len(nodes)
