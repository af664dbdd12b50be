"""Sinking the expansion of pictures to rows, against ONNX Runtime on the graph as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import ancestors, contents, feed, graph_of, operators, run, session
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from controlrt.compiler.compile import load_program, one_picture
from controlrt.compiler.flops import count_flops
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.profile import ShapeProfile

PROFILE = ShapeProfile.parse("128x128", "1-4")
RNG = np.random.default_rng(0)
SHAPES = {
    "image": ("batch", 4, 6, 6),
    "tokens": ("batch", 5, 8),
    "vector": ("batch", 8),
    "heads": ("batch", 2, 5, 4),
    "single": ("batch", 1, 8),
}
CONSTANTS: dict[str, NDArray[Any]] = {
    "kernel": RNG.standard_normal((6, 4, 3, 3), np.float32),
    "transposed": RNG.standard_normal((4, 6, 3, 3), np.float32),
    "bias_4": RNG.standard_normal(4, np.float32),
    "gain_4": RNG.standard_normal(4, np.float32),
    "gain_8": RNG.standard_normal(8, np.float32),
    "by_channel": RNG.standard_normal((1, 4, 1, 1), np.float32),
    "by_row": RNG.standard_normal((2, 1, 1, 1), np.float32),
    "by_row_and_token": RNG.standard_normal((2, 5, 8), np.float32),
    "weight": RNG.standard_normal((8, 3), np.float32),
    "tall": RNG.standard_normal((3, 5), np.float32),
    "batch_of_weights": RNG.standard_normal((2, 8, 3), np.float32),
    "bias_3": RNG.standard_normal(3, np.float32),
    "bias_1x3": RNG.standard_normal((1, 3), np.float32),
    "bias_2x3": RNG.standard_normal((2, 3), np.float32),
    "square": RNG.standard_normal((2, 8), np.float32),
    "half": np.array(0.5, np.float32),
    "truth": np.array([True, False, True, False, True, False, True, False]),
    "axis_1": np.array(1),
    "one": np.array([1]),
    "zero": np.array([0]),
    "minus_1": np.array([-1]),
    "minus_3": np.array([-3]),
    "two": np.array([2]),
    "three": np.array([3]),
    "sides": np.array([2, 3]),
    "none": np.array([], np.int64),
    "no_region": np.array([], np.float32),
    "picked": np.array([3, 0, 0]),
    "parts_4": np.array([1, 3]),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "twice_rows": np.array([2, 1, 1, 1], np.float32),
    "twice_by_axes": np.array([1, 2], np.float32),
    "to_tokens": np.array([0, 4, 36]),
    "to_heads": np.array([0, 5, 2, 4]),
    "rows_and_heads": np.array([-1, 5, 4]),
    "rows_unnamed": np.array([-1, 4, 36]),
    "tail": np.array([4, -1]),
    "split_rows": np.array([1, 1]),
    "by_8": RNG.standard_normal((5, 8), np.float32),
    "weight_t": RNG.standard_normal((3, 2), np.float32),
    "square_2x3": RNG.standard_normal((2, 3), np.float32),
    "by_row_and_token_8": RNG.standard_normal((3, 2, 8), np.float32),
    "to_kernel": np.array([2, 4, 6, 6]),
    "kernel_6": RNG.standard_normal((2, 6, 3, 3), np.float32),
    "square_kernel": RNG.standard_normal((4, 4, 3, 3), np.float32),
    "table": RNG.standard_normal((7, 4, 6, 6), np.float32),
}


def sharing(body: str, kind: str = "image", inputs: str = "", outputs: str = "float[rows] y") -> ir.Model:
    """``body`` makes y from x, the rows of ``latents``. Rank and shape of y are found by inference."""
    named = set(re.findall(r"\w+", body))
    shape = ", ".join(map(str, SHAPES[kind]))
    model = graph_of(
        f"float[{shape}] latents, int64[rows] rows{inputs}",
        outputs,
        f"x = Gather <axis = 0> (latents, rows) {body}",
        infer=False,
        **{name: value for name, value in CONSTANTS.items() if name in named},
    )
    for output in model.graph.outputs:
        if output.shape == ir.Shape(["rows"]):
            output.shape = None
    ShapeInferencePass()(model)
    return model


def expansions(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == "Gather" and n.inputs[1] is not None and n.inputs[1].name == "rows"]


def latents(kind: str, batch: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, *SHAPES[kind][1:]), np.float32)


def assert_same(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    """The arithmetic on a row is unchanged, but a kernel may block its sums by the batch: float32 rounding."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * max(np.abs(value).max(), 1e-6))


INDICES = {
    "guidance": lambda batch: np.tile(np.arange(batch), 2),
    "no guidance": np.arange,
    "backwards": lambda batch: np.arange(batch)[::-1].copy(),
    "uneven": lambda batch: np.array([0] * 3 + [batch - 1] * 2),
}

SINKS: dict[str, tuple[str, str]] = {
    "Conv": ("image", "y = Conv <pads = [1, 1, 1, 1]> (x, kernel)"),
    "ConvTranspose": ("image", "y = ConvTranspose <strides = [2, 2]> (x, transposed)"),
    "GroupNormalization": ("image", "y = GroupNormalization <num_groups = 2> (x, gain_4, bias_4)"),
    "InstanceNormalization": ("image", "y = InstanceNormalization (x, gain_4, bias_4)"),
    "LayerNormalization": ("tokens", "y = LayerNormalization <axis = -1> (x, gain_8)"),
    "LayerNormalization over two axes": ("tokens", "y = LayerNormalization <axis = 1> (x, by_8)"),
    "DepthToSpace": ("image", "y = DepthToSpace <blocksize = 2> (x)"),
    "SpaceToDepth": ("image", "y = SpaceToDepth <blocksize = 2> (x)"),
    "GlobalAveragePool": ("image", "y = GlobalAveragePool (x)"),
    "elementwise chain": ("image", "a = Sigmoid (x) b = Mul (a, x) c = Add (b, half) y = Tanh (c)"),
    "constant by channel": ("image", "y = Mul (by_channel, x)"),
    "constant of a lower rank": ("tokens", "y = Sub (x, gain_8)"),
    "Where": ("tokens", "y = Where (truth, x, half)"),
    "Clip": ("image", "y = Clip (x, half)"),
    "Cast": ("image", "a = Cast <to = 11> (x) y = Cast <to = 1> (a)"),
    "MatMul": ("tokens", "y = MatMul (x, weight)"),
    "MatMul of vectors": ("vector", "y = MatMul (x, weight)"),
    "MatMul from the left": ("tokens", "y = MatMul (tall, x)"),
    "MatMul of two": ("tokens", "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t)"),
    "MatMul of heads": ("heads", "t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (t, x)"),
    "Gemm": ("vector", "y = Gemm (x, weight, bias_3)"),
    "Gemm with a row of bias": ("vector", "y = Gemm <alpha = 0.5> (x, weight, bias_1x3)"),
    "Gemm transB": ("vector", "y = Gemm <transB = 1> (x, square)"),
    "Softmax": ("heads", "y = Softmax <axis = -1> (x)"),
    "LogSoftmax": ("heads", "y = LogSoftmax <axis = 2> (x)"),
    "Concat": ("image", "a = Neg (x) y = Concat <axis = 1> (x, a)"),
    "Split": ("image", "a, b = Split <axis = 1> (x, parts_4) y = Mul (a, b)"),
    "Slice": ("image", "y = Slice (x, one, three, two, one)"),
    "Gather of channels": ("image", "y = Gather <axis = 1> (x, picked)"),
    "ReduceMean": ("image", "y = ReduceMean (x, sides)"),
    "ReduceSum without the axes": ("image", "y = ReduceSum <keepdims = 0> (x, sides)"),
    "Squeeze": ("single", "y = Squeeze (x, one)"),
    "Unsqueeze": ("vector", "y = Unsqueeze (x, minus_1)"),
    "Transpose": ("image", "y = Transpose <perm = [0, 2, 3, 1]> (x)"),
    "Reshape": ("image", "y = Reshape (x, to_tokens)"),
    "Reshape and back": ("tokens", "a = Reshape (x, to_heads) b = Transpose <perm = [0, 2, 1, 3]> (a) y = Neg (b)"),
    "Reshape to computed sides": ("image", "t = Concat <axis = 0> (zero, tail) y = Reshape (x, t)"),
    "Resize": ("image", 'y = Resize <mode = "nearest"> (x, no_region, twice)'),
    "Attention": ("heads", "k = Neg (x) v = Tanh (x) y = Attention (x, k, v)"),
    "Attention of tokens": ("tokens", "y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x)"),
    "constant node": ("image", "c = Constant <value = float {2.0}> () y = Mul (x, c)"),
}


@pytest.mark.parametrize(("kind", "body"), SINKS.values(), ids=SINKS)
def test_sinks_to_the_end(kind: str, body: str) -> None:
    before, after = sharing(body, kind), sharing(body, kind)
    assert GuidanceSharing()(after).modified
    (expansion,) = expansions(after)
    assert expansion.outputs[0].is_graph_output()
    assert operators(after)[:-1] == operators(before)[1:]
    first, second = session(before), session(after)
    for batch in (1, 2, 3):
        for index in INDICES.values():
            values = {"latents": latents(kind, batch), "rows": index(batch)}
            assert_same(feed(second, values), feed(first, values))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), case=st.sampled_from(sorted(SINKS)))
def test_any_index(data: st.DataObject, case: str) -> None:
    kind, body = SINKS[case]
    batch = data.draw(st.integers(1, 4))
    index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=7))
    before, after = sharing(body, kind), sharing(body, kind)
    GuidanceSharing()(after)
    values = {"latents": latents(kind, batch, data.draw(st.integers(0, 99))), "rows": np.array(index)}
    assert_same(run(after, **values), run(before, **values))


NEAR_MISSES: dict[str, tuple[str, str]] = {
    "transpose that moves the rows": ("vector", "y = Transpose <perm = [1, 0]> (x)"),
    "transpose without perm": ("tokens", "y = Transpose (x)"),
    "reshape that merges rows and heads": ("heads", "y = Reshape (x, rows_and_heads)"),
    "reshape that does not say so": ("image", "y = Reshape (x, rows_unnamed)"),
    "reshape with allowzero": ("image", "y = Reshape <allowzero = 1> (x, rows_unnamed)"),
    "softmax over rows": ("tokens", "y = Softmax <axis = 0> (x)"),
    "softmax over rows, counted from the end": ("tokens", "y = Softmax <axis = -3> (x)"),
    "layer norm over everything": ("tokens", "y = LayerNormalization <axis = 0> (x, half)"),
    "concat of rows": ("image", "y = Concat <axis = 0> (x, x)"),
    "concat of rows, counted from the end": ("image", "y = Concat <axis = -4> (x, x)"),
    "split of rows": ("image", "y, z = Split <axis = 0> (x, split_rows)"),
    "split of rows, by default": ("image", "y, z = Split (x, split_rows)"),
    "slice of rows": ("image", "y = Slice (x, zero, one, zero)"),
    "slice without axes": ("image", "y = Slice (x, zero, one)"),
    "gather of rows by another index": ("image", "y = Gather <axis = 0> (x, split_rows)"),
    "reduce over rows": ("image", "y = ReduceMean (x, zero)"),
    "reduce over rows, counted from the end": ("tokens", "y = ReduceSum (x, minus_3)"),
    "reduce over everything": ("image", "y = ReduceMean <keepdims = 1> (x)"),
    "reduce over no axes, which is all": ("image", "y = ReduceSum (x, none)"),
    "squeeze of rows": ("image", "y = Squeeze (x, zero)"),
    "squeeze of what is 1": ("single", "y = Squeeze (x)"),
    "unsqueeze before the rows": ("image", "y = Unsqueeze (x, zero)"),
    "resize of rows": ("image", 'y = Resize <mode = "nearest"> (x, no_region, twice_rows)'),
    "resize of rows by axes": ("image", 'y = Resize <mode = "nearest", axes = [1, 0]> (x, no_region, twice_by_axes)'),
    "weight by row": ("tokens", "y = MatMul (x, batch_of_weights)"),
    "product over the rows": ("vector", "y = MatMul (weight_t, x)"),
    "product with its own transpose": ("vector", "t = Transpose <perm = [1, 0]> (x) y = MatMul (x, t)"),
    "gemm over the rows": ("vector", "y = Gemm <transA = 1> (x, square_2x3)"),
    "gemm with bias by row": ("vector", "y = Gemm (x, weight, bias_2x3)"),
    "constant by row": ("image", "y = Mul (x, by_row)"),
    "constant by row and token": ("tokens", "y = Add (by_row_and_token, x)"),
    "constant of a higher rank": ("vector", "y = Add (x, by_row_and_token_8)"),
    "rank that changes": ("vector", "a = Transpose <perm = [1, 0]> (x) y = Add (x, a)"),
    "operator nobody knows": ("image", "y = Hardmax <axis = 1> (x)"),
    "operator of another domain": ("image", "y = local.Relu (x)"),
    "cumulative sum": ("image", "y = CumSum (x, axis_1)"),
    "kernel by row": ("image", "k = Reshape (x, to_kernel) y = Conv (x, k)"),
}
NOT_RUN = {
    "squeeze of rows",
    "operator of another domain",
    "rank that changes",
    "split of rows",
    "split of rows, by default",
}
"""These do not run on two rows."""


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    kind, body = NEAR_MISSES[name]
    outputs = "float[rows] y, float[rows] z" if "y, z =" in body else "float[rows] y"
    model = sharing(body, kind, outputs=outputs)
    before = contents(model)
    assert not GuidanceSharing()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("name", sorted(set(NEAR_MISSES) - NOT_RUN))
def test_near_misses_are_graphs_that_run(name: str) -> None:
    """So that the pass refuses them for the reason that their name says."""
    kind, body = NEAR_MISSES[name]
    assert run(sharing(body, kind), latents=latents(kind, 2), rows=np.array([1, 0]))


WITH_PROMPT = ", float[rows, 6, 6, 6] prompt"
UNET = """a = Conv <pads = [1, 1, 1, 1]> (x, kernel) b = Sigmoid (a) c = Mul (a, b) d = Add (c, prompt)
    y = Conv <pads = [1, 1, 1, 1]> (d, kernel_6)"""


def test_sinks_to_the_first_value_that_differs_by_row() -> None:
    before, after = sharing(UNET, inputs=WITH_PROMPT), sharing(UNET, inputs=WITH_PROMPT)
    assert GuidanceSharing()(after).modified
    assert operators(after) == ["Conv", "Sigmoid", "Mul", "Gather", "Add", "Conv"]
    for batch, rows in ((1, 1), (1, 2), (2, 4), (3, 5)):
        values = {
            "latents": latents("image", batch),
            "rows": np.arange(rows) % batch,
            "prompt": np.random.default_rng(2).standard_normal((rows, 6, 6, 6), np.float32),
        }
        assert_same(run(after, **values), run(before, **values))


def test_flops_fall_by_what_is_shared() -> None:
    before, after = sharing(UNET, inputs=WITH_PROMPT), sharing(UNET, inputs=WITH_PROMPT)
    GuidanceSharing()(after)
    first = 2 * 6 * 6 * 6 * 4 * 9  # multiply-adds of one row of the first convolution, twice: FLOPs
    for batch, rows in ((1, 2), (3, 6), (2, 2)):
        counted = [count_flops(model.graph, {"batch": batch, "rows": rows}).total for model in (before, after)]
        assert counted[0] - counted[1] == first * (rows - batch)


def test_two_paths_meet_before_the_expansion() -> None:
    """A residual block: both branches sink, and their sum too."""
    body = "a = Conv <pads = [1, 1, 1, 1]> (x, square_kernel) b = Relu (a) y = Add (b, x)"
    before, after = sharing(body), sharing(body)
    GuidanceSharing()(after)
    assert operators(after) == ["Conv", "Relu", "Add", "Gather"]
    values = {"latents": latents("image", 2), "rows": np.array([0, 1, 0, 1])}
    assert_same(run(after, **values), run(before, **values))


def test_a_value_read_on_both_sides_is_computed_once() -> None:
    """A skip connection that leaves the shared part: its expansion stands beside the one further down."""
    body = "a = Neg (x) b = Tanh (a) c = Add (b, prompt) y = Mul (c, a)"
    inputs = ", float[rows, 4, 6, 6] prompt"
    before, after = sharing(body, inputs=inputs), sharing(body, inputs=inputs)
    GuidanceSharing()(after)
    assert operators(after).count("Neg") == operators(after).count("Tanh") == 1
    assert sorted(n.inputs[0].producer().op_type for n in expansions(after)) == ["Neg", "Tanh"]
    values = {"latents": latents("image", 2), "rows": np.array([0, 1, 1])}
    values["prompt"] = np.random.default_rng(3).standard_normal((3, 4, 6, 6), np.float32)
    assert_same(run(after, **values), run(before, **values))


def test_outputs_that_are_shared_keep_names_order_and_rows() -> None:
    """Among them one that is read further on."""
    body = "a = Neg (x) b = Tanh (a) c = Add (b, prompt)"
    outputs = "float[rows, 4, 6, 6] b, float[rows, 4, 6, 6] c, float[rows, 4, 6, 6] a"
    inputs = ", float[rows, 4, 6, 6] prompt"
    before, after = sharing(body, inputs=inputs, outputs=outputs), sharing(body, inputs=inputs, outputs=outputs)
    GuidanceSharing()(after)
    assert [value.name for value in after.graph.outputs] == ["b", "c", "a"]
    assert all(value.shape == ir.Shape(["rows", 4, 6, 6]) for value in after.graph.outputs)
    values = {"latents": latents("image", 2), "rows": np.array([1, 1, 0])}
    values["prompt"] = np.random.default_rng(3).standard_normal((3, 4, 6, 6), np.float32)
    assert_same(run(after, **values), run(before, **values))


def test_the_expanded_input_itself_as_an_output() -> None:
    model = sharing("y = Neg (x)", outputs="float[rows, 4, 6, 6] x, float[rows] y")
    values = {"latents": latents("image", 2), "rows": np.array([1, 1, 0])}
    expected = run(model, **values)
    GuidanceSharing()(model)
    assert_same(run(model, **values), expected)


def for_one_picture(body: str, inputs: str) -> ir.Model:
    """As the compiler gives it where the profile's batch is 1."""
    model = sharing(body, inputs=inputs)
    model.graph.inputs[0].shape = ir.Shape([1, *SHAPES["image"][1:]])
    return model


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("operands", ["(a, prompt)", "(prompt, a)"])
def test_one_picture_is_broadcast(operator: str, operands: str) -> None:
    body = f"a = Exp (x) y = {operator} {operands}"
    inputs = ", float[rows, 4, 6, 6] prompt"
    before, after = for_one_picture(body, inputs), for_one_picture(body, inputs)
    GuidanceSharing()(after)
    assert operators(after) == ["Exp", operator]
    for rows in (1, 2, 3):
        prompt = np.random.default_rng(rows).standard_normal((rows, 4, 6, 6), np.float32)
        values = {"latents": latents("image", 1), "rows": np.zeros(rows, np.int64), "prompt": prompt}
        assert_same(run(after, **values), run(before, **values))


NOT_BROADCAST = {
    "the other has one row": ("y = Add (a, prompt)", ", float[1, 4, 6, 6] prompt"),
    "the other has a lower rank": ("y = Add (a, prompt)", ", float[6, 6] prompt"),
    "concat": ("y = Concat <axis = 1> (a, prompt)", ", float[rows, 4, 6, 6] prompt"),
    "matrix product": ("y = MatMul (a, prompt)", ", float[rows, 4, 6, 6] prompt"),
}


@pytest.mark.parametrize(("body", "inputs"), NOT_BROADCAST.values(), ids=NOT_BROADCAST)
def test_what_needs_every_row_gets_it(body: str, inputs: str) -> None:
    before, after = (for_one_picture(f"a = Exp (x) {body}", inputs) for _ in range(2))
    GuidanceSharing()(after)
    assert len(expansions(after)) == 1
    shape = [3 if dim == "rows" else dim for dim in after.graph.inputs[2].shape]
    prompt = np.random.default_rng(1).standard_normal(shape, np.float32)
    values = {"latents": latents("image", 1), "rows": np.zeros(3, np.int64), "prompt": prompt}
    assert_same(run(after, **values), run(before, **values))


def test_several_pictures_are_not_broadcast() -> None:
    model = sharing("a = Exp (x) y = Add (a, prompt)", inputs=", float[rows, 4, 6, 6] prompt")
    GuidanceSharing()(model)
    assert operators(model) == ["Exp", "Gather", "Add"]


@pytest.mark.parametrize("copy", ["r = Identity (rows)", "r = Reshape (rows, minus_1)", "r = Reshape (rows, zero)"])
def test_copies_of_the_index_are_the_index(copy: str) -> None:
    """torch.export writes one for every index_select."""
    body = f"{copy} u = Gather <axis = 0> (latents, r) a = Neg (x) b = Tanh (u) y = Add (a, b)"
    before, after = sharing(body), sharing(body)
    GuidanceSharing()(after)
    assert operators(after) == ["Neg", "Tanh", "Add", "Gather"]
    values = {"latents": latents("image", 2), "rows": np.array([1, 0, 1])}
    assert_same(run(after, **values), run(before, **values))


ODD_EXPANSIONS = {
    "a table of another length": "t = Gather <axis = 0> (table, rows) y = Add (x, t)",
    "rows expanded again": "t = Gather <axis = 0> (x, rows) y = Add (x, t)",
}


@pytest.mark.parametrize("body", ODD_EXPANSIONS.values(), ids=ODD_EXPANSIONS)
def test_only_values_with_the_same_entries_meet(body: str) -> None:
    """Both are gathered by the index, but not from the same pictures."""
    before, after = sharing(body), sharing(body)
    GuidanceSharing()(after)
    for index in ([1, 0, 1], [0, 1], [1]):
        values = {"latents": latents("image", 2), "rows": np.array(index)}
        if "(x, rows)" in body and len(index) == 1:
            values["rows"] = np.array([0])
        assert_same(run(after, **values), run(before, **values))


def test_another_index_is_left_alone() -> None:
    model = sharing("p = Gather <axis = 0> (latents, other) y = Neg (p)", inputs=", int64[rows] other")
    before = contents(model)
    assert not GuidanceSharing()(model).modified
    assert contents(model) == before
    assert GuidanceSharing(index="other")(model).modified
    assert operators(model) == ["Neg", "Gather"]


def test_a_graph_without_the_index() -> None:
    model = graph_of("float[n] x", "float[n] y", "y = Neg (x)")
    before = contents(model)
    assert not GuidanceSharing()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("name", SINKS)
def test_second_time(name: str) -> None:
    kind, body = SINKS[name]
    model = sharing(body, kind)
    GuidanceSharing()(model)
    before = contents(model)
    assert not GuidanceSharing()(model).modified
    assert contents(model) == before


every_family = pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"], indirect=True, scope="module")
BY_ROW = ("prompt_embeds", "text_embeds", "time_ids", "residual", "guidance", "conditioning_scale")
"""The inputs of a step that differ from row to row."""


@pytest.fixture(scope="module", params=["unet", "controlnet.first"])
def step(request: pytest.FixtureRequest, exported: Path) -> tuple[ir.Model, ir.Model]:
    """A traced step before and after the pass."""
    program = next(p for p in read_manifest(exported).programs if p.name == request.param)
    before, after = (load_program(program, exported, PROFILE) for _ in range(2))
    RowAgnosticReshapes()(before)
    RowAgnosticReshapes()(after)
    assert GuidanceSharing()(after).modified
    return before, after


def step_inputs(model: ir.Model, batch: int, index: NDArray[np.int64], seed: int) -> dict[str, NDArray[Any]]:
    dims = one_picture(PROFILE) | {"batch": batch, "rows": len(index)}
    values: dict[str, NDArray[Any]] = {}
    for number, value in enumerate(model.graph.inputs):
        rng = np.random.default_rng([seed, number])
        shape = [dim if isinstance(dim, int) else dims[dim.value] for dim in value.shape]
        values[value.name] = rng.standard_normal(shape, np.float32)
    return values | {"rows": index, "timestep": np.linspace(20, 900, batch).astype(np.float32)}


@every_family
def test_traced_steps(step: tuple[ir.Model, ir.Model]) -> None:
    before, after = step
    first, second = session(before), session(after)
    for seed, (batch, index) in enumerate([(1, [0, 0]), (1, [0]), (2, [0, 1, 0, 1]), (3, [2, 0, 1, 1, 2])]):
        values = step_inputs(before, batch, np.array(index), seed)
        expected, found = feed(first, values), feed(second, values)
        for name, value in expected.items():
            # the rounding of assert_same, which grows a little through a whole network
            np.testing.assert_allclose(found[name], value, rtol=0, atol=3e-6 * np.abs(value).max())


@every_family
def test_traced_steps_expand_as_late_as_possible(step: tuple[ir.Model, ir.Model]) -> None:
    """No operator but the expansion itself works on rows before something that differs by row has come in."""
    before, after = step

    def too_early(model: ir.Model) -> Iterator[ir.Node]:
        for node in model.graph:
            names = {value.name or "" for value in ancestors(node.outputs[0])}
            differs = any(name.startswith(BY_ROW) for name in names)
            if "rows" in names and not differs and node not in expansions(model):
                yield node

    assert len(list(too_early(before))) > 10
    assert list(too_early(after)) == []


@every_family
def test_traced_steps_cost_less(step: tuple[ir.Model, ir.Model]) -> None:
    before, after = step
    dims = one_picture(PROFILE)
    guided = [count_flops(model.graph, dims).total for model in step]
    assert guided[1] < guided[0]
    alone = [count_flops(model.graph, dims | {"rows": 1}).total for model in step]
    assert alone[1] == alone[0]
    assert len([n for n in after.graph if n.op_type == "Conv"]) == len([n for n in before.graph if n.op_type == "Conv"])
