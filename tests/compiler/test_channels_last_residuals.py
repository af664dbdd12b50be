"""What passes from program to program, with channels first and last."""

from __future__ import annotations

import numpy as np
from compiler.graphs import contents, graph_of, operators, run

from controlrt.compiler.passes.channels_last_residuals import ChannelsLastResiduals
from controlrt.compiler.passes.sink_transposes import SinkTransposes

INPUTS = "float[rows, 3, 4, 5] residual_0_in, float[rows, 3, 4, 5] latents"
OUTPUTS = "float[rows, 3, 4, 5] residual_0, float[rows, 3, 4, 5] next_latents"
BODY = "residual_0 = Add (residual_0_in, latents) next_latents = Neg (residual_0)"


def test_the_same_residuals_with_channels_last() -> None:
    before, after = (graph_of(INPUTS, OUTPUTS, BODY) for _ in range(2))
    assert ChannelsLastResiduals()(after).modified
    shapes = {value.name: str(value.shape) for value in (*after.graph.inputs, *after.graph.outputs)}
    assert shapes["residual_0_in"] == shapes["residual_0"] == "[rows,4,5,3]"
    assert shapes["latents"] == shapes["next_latents"] == "[rows,3,4,5]"
    rng = np.random.default_rng(0)
    residual, latents = (rng.normal(0, 1, (2, 3, 4, 5)).astype(np.float32) for _ in range(2))
    expected = run(before, residual_0_in=residual, latents=latents)
    found = run(after, residual_0_in=np.ascontiguousarray(residual.transpose(0, 2, 3, 1)), latents=latents)
    np.testing.assert_array_equal(found["residual_0"].transpose(0, 3, 1, 2), expected["residual_0"])
    np.testing.assert_array_equal(found["next_latents"], expected["next_latents"])


def test_transposes_at_both_ends_cancel() -> None:
    body = "a = Mul (residual_0_in, two) residual_0 = Neg (a)"
    model = graph_of("float[rows, 3, 4, 5] residual_0_in", "float[rows, 3, 4, 5] residual_0", body, two=2.0)
    ChannelsLastResiduals()(model)
    assert operators(model) == ["Transpose", "Mul", "Neg", "Transpose"]
    assert SinkTransposes()(model).modified
    assert operators(model) == ["Mul", "Neg"]
    x = np.arange(60, dtype=np.float32).reshape(1, 4, 5, 3)
    np.testing.assert_array_equal(run(model, residual_0_in=x)["residual_0"], -2 * x)


def test_near_misses() -> None:
    for inputs, outputs in (
        ("float[rows, 3, 4, 5] residuals", "float[rows, 3, 4, 5] y"),
        ("float[rows, 3] residual_0_in", "float[rows, 3] y"),
    ):
        name = inputs.split()[-1]
        model = graph_of(inputs, outputs, f"y = Neg ({name})")
        before = contents(model)
        assert not ChannelsLastResiduals()(model).modified
        assert contents(model) == before


def test_idempotent() -> None:
    model = graph_of(INPUTS, OUTPUTS, BODY)
    for sink in (False, True):
        ChannelsLastResiduals()(model)
        if sink:
            SinkTransposes()(model)
        before = contents(model)
        assert not ChannelsLastResiduals()(model).modified
        assert contents(model) == before
