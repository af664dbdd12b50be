"""Group norms that are written out, against float64 in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from compiler.graphs import graph_of, operators, run
from compiler.group_norms import group_norm

from controlrt.compiler.exact_norms import write_out_group_norms

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("mean", [0.3, 10.0])
@pytest.mark.parametrize(
    "shape", [(1, 8, 1024, 1024), (2, 32, 64, 48), (3, 32, 4096), (2, 64, 1, 1), (1, 16, 4, 8, 16)]
)
def test_it_is_exact(shape: tuple[int, ...], mean: float) -> None:
    """ONNX Runtime's own is wrong by as much as 2e-4 of the largest value; a few roundings are 5e-7 here at most."""
    scale, bias = RNG.normal(1, 1, shape[1]), RNG.normal(0, 1, shape[1])
    dims = ", ".join(["rows", str(shape[1]), *(f"side_{axis}" for axis in range(len(shape) - 2))])
    model = graph_of(
        f"float[{dims}] x",
        f"float[{dims}] y",
        "t = GroupNormalization <num_groups = 4, epsilon = 0.001> (x, scale, bias) y = Neg (t)",
        scale=scale,
        bias=bias,
    )
    write_out_group_norms(model)
    assert "GroupNormalization" not in operators(model)
    x = RNG.normal(mean, 1, shape).astype(np.float32)
    expected = -group_norm(x, scale.astype(np.float32), bias.astype(np.float32), 4, 0.001)
    (found,) = run(model, x=x).values()
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-6


def test_several_and_none() -> None:
    weights = {"scale": RNG.normal(1, 1, 8), "bias": RNG.normal(0, 1, 8)}
    norms = (
        "GroupNormalization <num_groups = 2> (x, scale, bias)",
        "GroupNormalization <num_groups = 4> (t, scale, bias)",
    )
    body = f"t = {norms[0]} y = {norms[1]}"
    model = graph_of("float[rows, 8, 6, 5] x", "float[rows, 8, 6, 5] y", body, **weights)
    write_out_group_norms(model)
    x = RNG.normal(1, 2, (3, 8, 6, 5)).astype(np.float32)
    scale, bias = (weights[name].astype(np.float32) for name in ("scale", "bias"))
    once = group_norm(x, scale, bias, 2, 1e-5)
    (found,) = run(model, x=x).values()
    np.testing.assert_allclose(found, group_norm(once.astype(np.float32), scale, bias, 4, 1e-5), atol=1e-5)
    other = graph_of("float[2] x", "float[2] y", "y = Neg (x)")
    write_out_group_norms(other)
    assert operators(other) == ["Neg"]


@pytest.mark.parametrize("case", ["half precision", "statistics in half precision", "no shape"])
def test_what_stays(case: str) -> None:
    kind = "float16" if case == "half precision" else "float"
    stash = ", stash_type = 10" if case == "statistics in half precision" else ""
    weights = {name: np.ones(8, {"float": np.float32, "float16": np.float16}[kind]) for name in ("scale", "bias")}
    body = f"y = GroupNormalization <num_groups = 2{stash}> (x, scale, bias)"
    model = graph_of(f"{kind}[rows, 8, 6, 5] x", f"{kind}[rows, 8, 6, 5] y", body, infer=False, **weights)
    if case == "no shape":
        model.graph.inputs[0].shape = None
    write_out_group_norms(model)
    assert operators(model) == ["GroupNormalization"]
