"""Attention before and after it is done in tiles, in ONNX Runtime and against PyTorch."""

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

from controlrt.compiler.compile import load_program, one_picture
from controlrt.compiler.flops import count_flops
from controlrt.compiler.passes.attention_layout import AttentionLayout
from controlrt.compiler.passes.tiled_attention import MIN_KEYS, TiledAttention
from controlrt.compiler.verify import Verifier
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.profile import ShapeProfile

HEADS, WIDTH = 3, 4
CHANNELS = HEADS * WIDTH


def attention(
    attributes: str = "q_num_heads = 3, kv_num_heads = 3",
    inputs: str = "float[rows, n, 12] q, float[rows, m, 12] k, float[rows, m, 12] v",
    attend: str = "y = Attention <{attributes}> (q, k, v)",
    outputs: str = "float[rows, n, 12] z",
    end: str = "z = Neg (y)",
    infer: bool = True,
) -> ir.Model:
    """Attention of q, k and v."""
    return graph_of(inputs, outputs, f"{attend.replace('{attributes}', attributes)} {end}", infer)


def operands(rows: int, queries: int, keys: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    lengths = {"q": queries, "k": keys, "v": keys}
    return {name: rng.standard_normal((rows, length, CHANNELS), np.float32) for name, length in lengths.items()}


def assert_same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    # exponentials and sums over all keys, in blocks or at once, each rounded to 2^-24
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


FIRES: dict[str, dict[str, Any]] = {
    "number of keys not known": {},
    "scale": {"attributes": "q_num_heads = 3, kv_num_heads = 3, scale = 0.3"},
    "defaults in full": {
        "attributes": "q_num_heads = 3, kv_num_heads = 3, is_causal = 0, softcap = 0.0, qk_matmul_output_mode = 0"
    },
    "one value for all": {"attend": "y = Attention <{attributes}> (k, k, k)", "outputs": "float[rows, m, 12] z"},
    "the result is an output": {"end": "", "outputs": "float[rows, n, 12] y"},
}


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_same_result(case: dict[str, Any]) -> None:
    before, after = attention(**case), attention(**case)
    assert TiledAttention()(after).modified
    assert "Attention" not in operators(after)
    first, second = session(before), session(after)
    for rows, queries, keys in ((1, 1, 1), (2, 7, 7), (3, 5, 900)):
        values = operands(rows, queries, keys)
        (expected,), (found,) = feed(first, values).values(), feed(second, values).values()
        assert_same(found, expected)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 3), queries=st.integers(1, 700), keys=st.integers(1, 700), seed=st.integers(0, 99))
def test_like_pytorch(rows: int, queries: int, keys: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    model = attention()
    TiledAttention()(model)
    values = operands(rows, queries, keys, seed)
    q, k, v = (torch.from_numpy(values[name]).unflatten(2, (HEADS, -1)).transpose(1, 2) for name in "qkv")
    expected = -torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).numpy()
    assert_same(run(model, **values)["z"], expected)


def test_scores_of_any_size() -> None:
    """The running maximum keeps exponentials finite, whichever block of keys the largest score is in."""
    torch = pytest.importorskip("torch")
    model = attention()
    TiledAttention()(model)
    values = operands(1, 600, 2000)
    values["k"][:, ::300] *= 200
    q, k, v = (torch.from_numpy(values[name]).double().unflatten(2, (HEADS, -1)).transpose(1, 2) for name in "qkv")
    expected = -torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).numpy()
    # scores are up to a few hundred here, where a rounded exponent is 1e-5 of its exponential
    np.testing.assert_allclose(run(model, **values)["z"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_what_is_recorded() -> None:
    model = attention()
    TiledAttention()(model)
    (node, _) = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "MultiHeadAttention")
    assert [value.name for value in node.inputs if value is not None] == ["q", "k", "v"]
    output = node.outputs[0]
    assert (output.name, output.dtype, output.shape) == ("y", ir.DataType.FLOAT, ir.Shape(["rows", "n", CHANNELS]))


def long(keys: int | str, heads: int = 3, channels: int = 12) -> dict[str, Any]:
    """An attention of a known number of keys."""
    return {
        "attributes": f"q_num_heads = {heads}, kv_num_heads = {heads}",
        "inputs": f"float[rows, n, {channels}] q, float[rows, {keys}, {channels}] k, float[rows, {keys}, {channels}] v",
        "outputs": f"float[rows, n, {channels}] z",
    }


@pytest.mark.parametrize(
    ("case", "modified"),
    [
        (long(MIN_KEYS), True),
        (long(MIN_KEYS - 1), False),
        (long(77), False),
        (long("tokens"), False),
        (long("sides"), True),
        (long(4096, heads=2, channels=512), True),
        (long(4096, heads=1, channels=512), False),
    ],
    ids=[
        "many",
        "few",
        "prompt",
        "prompt of any length",
        "of any length",
        "two wide heads",
        "one head, too wide",
    ],
)
def test_where_it_is_worth_it(case: dict[str, Any], modified: bool) -> None:
    assert TiledAttention()(attention(**case)).modified == modified


def test_pictures_as_prompts_have_few_keys() -> None:
    """The text format has no such dimension."""
    model = attention(**long("pictures"))
    for value in model.graph.inputs:
        value.shape = ir.Shape(["images_0*4" if str(dim) == "pictures" else dim for dim in value.shape or ()])
    assert not TiledAttention()(model).modified


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "causal": {"attributes": "q_num_heads = 3, kv_num_heads = 3, is_causal = 1"},
    "capped scores": {"attributes": "q_num_heads = 3, kv_num_heads = 3, softcap = 5.0"},
    "softmax in double": {"attributes": "q_num_heads = 3, kv_num_heads = 3, softmax_precision = 11"},
    "fewer heads of keys": {
        "attributes": "q_num_heads = 3, kv_num_heads = 1",
        "inputs": "float[rows, n, 12] q, float[rows, m, 4] k, float[rows, m, 4] v",
    },
    "wider values": {
        "inputs": "float[rows, n, 12] q, float[rows, m, 12] k, float[rows, m, 15] v",
        "outputs": "float[rows, n, 15] z",
    },
    "heads are an axis": {
        "inputs": "float[rows, 3, n, 4] q, float[rows, 3, m, 4] k, float[rows, 3, m, 4] v",
        "attend": "y = Attention (q, k, v)",
        "outputs": "float[rows, 3, n, 4] z",
    },
    "mask": {
        "inputs": "float[rows, n, 12] q, float[rows, m, 12] k, float[rows, m, 12] v, float[n, m] mask",
        "attend": "y = Attention <{attributes}> (q, k, v, mask)",
    },
    "past keys": {
        "inputs": "float[rows, n, 12] q, float[rows, m, 12] k, float[rows, m, 12] v, "
        "float[rows, 3, p, 4] pk, float[rows, 3, p, 4] pv",
        "attend": "y, nk, nv = Attention <{attributes}> (q, k, v, , pk, pv)",
        "infer": False,
    },
    "keys are passed on": {
        "attend": "y, nk, nv = Attention <{attributes}> (q, k, v)",
        "end": "s = ReduceSum <keepdims = 0> (nk) z = Mul (y, s)",
    },
    "half precision": {
        "inputs": "float16[rows, n, 12] q, float16[rows, m, 12] k, float16[rows, m, 12] v",
        "outputs": "float16[rows, n, 12] z",
    },
    "another domain's": {"attend": "y = local.Attention <{attributes}> (q, k, v)"},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = attention(**case)
    before = contents(model)
    assert not TiledAttention()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_second_time(case: dict[str, Any]) -> None:
    model = attention(**case)
    TiledAttention()(model)
    before = contents(model)
    assert not TiledAttention()(model).modified
    assert contents(model) == before


def test_flops_stay() -> None:
    before, after = attention(), attention()
    TiledAttention()(after)
    dims = {"rows": 2, "n": 5, "m": 7}
    assert count_flops(after.graph, dims).total == count_flops(before.graph, dims).total == 4 * 2 * 5 * 7 * CHANNELS


def keys_of(model: ir.Model, op_type: str) -> list[int]:
    shapes = [node.inputs[1].shape for node in model.graph if node.op_type == op_type and node.inputs[1] is not None]
    return [length for shape in shapes if shape is not None and isinstance(length := shape[1], int)]


@pytest.mark.parametrize("family", ["sd15", "sd21"], indirect=True, scope="module")
@pytest.mark.parametrize("name", ["unet", "controlnet.first"])
def test_traced_steps(exported: Path, name: str, tmp_path: Path) -> None:
    """The long half of their attentions goes into tiles, the prompt's 77 tokens do not, and the step's result stays."""
    profile = ShapeProfile.parse("128x128", "1-4")
    program = next(program for program in read_manifest(exported).programs if program.name == name)
    before, after = (load_program(program, exported, profile) for _ in range(2))
    for model in (before, after):
        AttentionLayout()(model)
    assert TiledAttention(min_keys=78)(after).modified
    tiled, left = (keys_of(after, op_type) for op_type in ("MultiHeadAttention", "Attention"))
    assert min(tiled) > 77
    assert 77 in left
    assert max(left) == 77
    with Verifier(one_picture(profile), tmp_path) as verifier:
        verifier.check_pass(name, "TiledAttention", before, after)
