"""The pass to float16: what it types, what it leaves in float32, and what that is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from compiler.graphs import graph_of, run

from controlrt.compiler.binding import cut
from controlrt.compiler.passes.half_precision import HalfPrecision

RNG = np.random.default_rng(0)
LABELS = {"timestep": "timestep", "prompt_embeds": "prompt", "rows": "layout"}
W = RNG.standard_normal((64, 64), np.float32) / 8


def in_half(model: ir.Model, **options: Any) -> ir.Model:
    copy = model.clone()
    result = HalfPrecision(LABELS, **options)(copy)
    assert result.modified
    return copy


def types(model: ir.Model) -> dict[str, str]:
    """Of every value that a node gives."""
    return {v.name or "": v.dtype.name for node in model.graph for v in node.outputs if v.dtype is not None}


def node_that_makes(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if name in [output.name for output in node.outputs])


def step() -> ir.Model:
    """A UNet in small: time, prompt, a norm, attention, guidance and an update."""
    return graph_of(
        "float[batch, 64] latents, float[batch, 1] input_scale, int64[rows] rows, float[batch, 1] timestep, "
        "float[rows, 64] prompt_embeds, float[rows, 64] residual_0_in, float[batch, rows] guidance, "
        "float[batch, 3] update",
        "float[batch, 64] next_latents, float[rows, 64] residual_0",
        "scaled = Mul (latents, input_scale) x = Gather <axis = 0> (scaled, rows) "
        "angle = MatMul (timestep, frequencies) wave = Sin (angle) t = MatMul (wave, w) "
        "te = Gather <axis = 0> (t, rows) "
        "h = MatMul (x, w) g = Add (h, te) n = LayerNormalization (g, ones, zeros) "
        "k = MatMul (prompt_embeds, w) scores = Mul (n, k) p = Softmax (scores) a = Mul (p, n) "
        "residual_0 = Add (a, residual_0_in) output = MatMul (residual_0, w) "
        "guided = MatMul (guidance, output) next_latents = Sub (latents, guided)",
        frequencies=np.geomspace(1, 1e-4, 64, dtype=np.float32)[None],
        w=W,
        ones=np.ones(64, np.float32),
        zeros=np.zeros(64, np.float32),
    )


def step_inputs(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((2, 64), np.float32),
        "input_scale": rng.random((2, 1), np.float32),
        "rows": np.array([0, 1, 0, 1]),
        "timestep": np.array([[981.0], [7.0]], np.float32),
        "prompt_embeds": rng.standard_normal((4, 64), np.float32),
        "residual_0_in": rng.standard_normal((4, 64), np.float32),
        "guidance": np.array([[-6.5, 0, 7.5, 0], [0, -6.5, 0, 7.5]], np.float32),
        "update": rng.random((2, 3), np.float32),
    }


def test_every_value_has_one_type_and_the_graph_is_valid() -> None:
    half = in_half(step())
    onnx.checker.check_model(ir.to_proto(half), full_check=True)  # infers every type and compares
    found = types(half)
    assert {found[name] for name in ("h", "g", "n", "k", "a", "residual_0", "output", "x", "te")} == {"FLOAT16"}


def test_the_islands_are_those_that_the_module_names() -> None:
    half = in_half(step())
    found = types(half)
    for name in ("angle", "wave", "t"):  # known before the step
        assert found[name] == "FLOAT", name
    for name in ("scaled", "guided", "next_latents", "p"):
        assert found[name] == "FLOAT", name
    assert node_that_makes(half, "n").attributes["stash_type"].as_int() == ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("island", "value"), [("timestep", "wave"), ("sampler", "guided"), ("sampler", "scaled"), ("softmax", "p")]
)
def test_an_island_may_be_given_up(island: str, value: str) -> None:
    kept = [name for name in ("timestep", "sampler", "normalization", "softmax") if name != island]
    assert types(in_half(step(), islands=kept))[value] == "FLOAT16"


def test_what_is_embedded_beside_the_timestep_stays_with_it() -> None:
    """As SDXL's sizes, sinusoids as well, and a consistency model's guidance; what the step reads too does not."""
    model = graph_of(
        "float[rows, 1] timestep, float[rows, 1] time_ids, float[rows, 64] prompt_embeds, float[rows, 64] latents",
        "float[rows, 64] y",
        "angle = Mul (time_ids, frequencies) wave = Sin (angle) pooled = MatMul (prompt_embeds, w) "
        "added = Add (wave, pooled) t = Add (timestep, added) emb = MatMul (t, w) "
        "x = Add (latents, emb) y = Mul (x, pooled)",
        frequencies=np.geomspace(1, 1e-4, 64, dtype=np.float32)[None],
        w=W,
    )
    HalfPrecision({**LABELS, "time_ids": "prompt"})(model)
    found = types(model)
    assert {found[name] for name in ("angle", "wave", "added", "t", "emb")} == {"FLOAT"}
    assert found["pooled"] == found["x"] == "FLOAT16"


def test_callers_see_float32_but_for_residuals() -> None:
    half = in_half(step())
    assert {value.name: value.dtype.name for value in half.graph.inputs if value.dtype} == {
        **dict.fromkeys(("latents", "input_scale", "timestep", "prompt_embeds", "guidance", "update"), "FLOAT"),
        "rows": "INT64",
        "residual_0_in": "FLOAT16",
    }
    assert [(v.name, v.dtype.name) for v in half.graph.outputs if v.dtype] == [
        ("next_latents", "FLOAT"),
        ("residual_0", "FLOAT16"),
    ]


def test_what_crosses_the_cut_is_float16() -> None:
    programs = cut(in_half(step()), LABELS)
    crossing = {v.name: v.dtype.name for v in programs["step"].graph.inputs if v.dtype and v.name}
    assert crossing["timestep_0"] == crossing["prompt_0"] == "FLOAT16"
    assert [v.dtype.name for v in programs["timestep"].graph.inputs if v.dtype] == ["FLOAT"]


@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_that_of_float32_up_to_rounding(seed: int) -> None:
    """Some ten roundings of 2^-11 each lie on the way, and guidance multiplies what they leave by about ten."""
    values = step_inputs(seed)
    expected = run(step(), **values)
    found = run(in_half(step()), **values | {"residual_0_in": values["residual_0_in"].astype(np.float16)})
    for name, bound in (("residual_0", 10 * 2**-11), ("next_latents", 100 * 2**-11)):
        error = np.abs(found[name].astype(np.float32) - expected[name]).max() / np.abs(expected[name]).max()
        assert 0 < error < bound, name


def test_weights_are_rounded_to_nearest_and_kept_in_range() -> None:
    weight = np.array([[1 + 2**-11 + 2**-20, -3.4e38], [65519.0, 1e-9]], np.float32)
    model = graph_of("float[n, 2] x", "float[n, 2] y", "y = MatMul (x, weight)", weight=weight)
    half = in_half(model)
    (tensor,) = [v.const_value for v in node_that_makes(half, "y.FLOAT16").inputs[1:] if v is not None]
    assert tensor is not None
    assert tensor.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(tensor.numpy(), np.array([[1 + 2**-10, -65504], [65504, 0]], np.float16))


def test_attention_keeps_its_softmax_in_float32() -> None:
    model = graph_of(
        "float[n, 2, 8, 4] q, float[n, 2, 8, 4] k, float[n, 2, 8, 4] v",
        "float[n, 2, 8, 4] y",
        "y = Attention (q, k, v)",
    )
    attention = next(node for node in in_half(model).graph if node.op_type == "Attention")
    assert attention.attributes["softmax_precision"].as_int() == ir.DataType.FLOAT
    half = in_half(model, islands=())
    assert "softmax_precision" not in next(n for n in half.graph if n.op_type == "Attention").attributes


def test_what_an_operator_reads_in_float32_only_stays_so() -> None:
    """Resize's scales are float32 by its schema, and Range has no float16 at all."""
    model = graph_of(
        "float[1, 1, n, 4] x, float start, float limit",
        "float[1, 1, m, 8] y, float[k] r",
        "z = Relu (x) y = Resize (z, , scales) r = Range (start, limit, one)",
        infer=False,
        scales=np.array([1, 1, 2, 2], np.float32),
        one=np.float32(1),
    )
    for value in (output for node in model.graph for output in node.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    half = in_half(model)
    scales = next(node for node in half.graph if node.op_type == "Resize").inputs[2]
    assert scales is not None
    assert scales.dtype == ir.DataType.FLOAT
    assert next(node for node in half.graph if node.op_type == "Range").outputs[0].dtype == ir.DataType.FLOAT
    found = run(
        half, x=np.ones((1, 1, 2, 4), np.float32), start=np.array(0, np.float32), limit=np.array(5000, np.float32)
    )
    assert found["y"].shape == (1, 1, 4, 8)
    assert found["r"][-1] == 4999


def test_operators_that_nobody_knows_stay_in_float32() -> None:
    model = graph_of("float[4] x", "float[4] y", "a = Relu (x) b = local.Mystery (a) y = Relu (b)", infer=False)
    for value in (output for node in model.graph for output in node.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    half = in_half(model)
    mystery = next(node for node in half.graph if node.op_type == "Mystery")
    assert [value.dtype for value in mystery.inputs if value is not None] == [ir.DataType.FLOAT]
    assert mystery.outputs[0].dtype == ir.DataType.FLOAT


def test_an_integer_becomes_float16_at_once() -> None:
    half = in_half(graph_of("int64[4] i, float[4] x", "float[4] y", "f = Cast <to = 1> (i) y = Add (f, x)"))
    assert types(half)["f"] == "FLOAT16"
    np.testing.assert_array_equal(run(half, i=np.arange(4), x=np.ones(4, np.float32))["y"], [1, 2, 3, 4])


def test_again_changes_nothing() -> None:
    half = in_half(step())
    before = ir.to_proto(half).SerializeToString()
    assert not HalfPrecision(LABELS)(half).modified
    assert ir.to_proto(half).SerializeToString() == before


def test_integers_alone_are_left() -> None:
    model = graph_of("int64[4] x", "int64[4] y", "y = Add (x, x)")
    assert not HalfPrecision({})(model).modified


def test_control_flow_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> g (bool c, float[4] x) => (float[4] y) '
        "{ y = If (c) <then_branch = t () => (float[4] a) { a = Identity (x) }, "
        "else_branch = e () => (float[4] b) { b = Neg (x) }> }"
    )
    with pytest.raises(ValueError, match="control flow"):
        HalfPrecision({})(model)


def test_float16_cannot_carry_the_timestep() -> None:
    """Why the island is there, by NumPy alone: the arguments of Stable Diffusion 1.5's 160 sinusoids (Vaswani et al.
    2017, arXiv 1706.03762, 3.5) are off by up to a quarter at the end of the schedule, and with them the waves."""
    arguments = np.arange(600, 1000)[:, None] * 10000.0 ** (-np.arange(160) / 160)
    exact = np.sin(arguments)
    assert np.abs(np.sin(arguments.astype(np.float16).astype(np.float64)) - exact).max() > 0.2
    assert np.abs(np.sin(arguments.astype(np.float32).astype(np.float64)) - exact).max() < 1e-4


def test_float16_cannot_sum_a_softmax() -> None:
    """The sum over the 4,096 keys of a 64x64 latent stalls at 2,048 where every addition rounds to float16."""
    total = np.float16(0)
    for _ in range(4096):
        total = np.float16(total + np.float16(1))
    assert total == 2048
