"""The UNet's step in two, against the whole: what needs no residuals, and the rest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from compiler.graphs import graph_of, operators, read_by, run

from controlrt.compiler.split import split_step

RNG = np.random.default_rng(0)
INPUTS = "float[rows, 4] latents, float[rows, 4] table, float[rows, 4] residual_0_in"
BODY = """
    slice = Mul(table, half)
    deep = MatMul(latents, weight)
    skip = Add(deep, slice)
    deeper = Tanh(skip)
    joined = Add(skip, residual_0_in)
    late = Mul(slice, joined)
    together = Add(late, deeper)
    next_latents = Sub(together, table)
"""
WEIGHTS = {"weight": RNG.normal(0, 1, (4, 4)), "half": 0.5}
VALUES = {name: RNG.normal(0, 1, (3, 4)).astype(np.float32) for name in ("latents", "table", "residual_0_in")}


def step(body: str = BODY) -> ir.Model:
    return graph_of(INPUTS, "float[rows, 4] next_latents", body, **read_by(body, WEIGHTS))


def test_both_together_are_the_whole() -> None:
    whole = step()
    halves = split_step(whole)
    assert halves is not None
    encoder, rest = halves
    passed = run(encoder, **{name: VALUES[name] for name in ("latents", "table")})
    assert list(passed) == ["encoded_0", "encoded_1"]
    given = {**passed, **{name: VALUES[name] for name in ("table", "residual_0_in")}}
    found = run(rest, **given)["next_latents"]
    np.testing.assert_array_equal(found, run(step(), **VALUES)["next_latents"])
    assert [value.name for value in whole.graph.inputs] == ["latents", "table", "residual_0_in"]  # as it was


def test_what_reads_no_latents_goes_where_it_is_read() -> None:
    halves = split_step(step())
    assert halves is not None
    encoder, rest = halves
    assert sorted(operators(encoder)) == ["Add", "MatMul", "Mul", "Tanh"]
    assert sorted(operators(rest)) == ["Add", "Add", "Mul", "Mul", "Sub"]  # the slice of the table is made in both
    assert [value.name for value in encoder.graph.inputs] == ["latents", "table"]
    assert "latents" not in [value.name for value in rest.graph.inputs]
    for value in rest.graph.inputs[2:]:
        assert value.shape == ir.Shape([ir.SymbolicDim("rows"), 4])


def test_nothing_to_split() -> None:
    assert split_step(step("next_latents = Add(latents, table)")) is None
    assert split_step(step("sum = Add(latents, residual_0_in)\nnext_latents = Mul(sum, table)")) is None


def test_a_shape_that_nobody_knows_leaves_it_whole() -> None:
    model = step()
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    assert split_step(model) is None
