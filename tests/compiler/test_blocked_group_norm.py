"""Group norms from the moments of runs, in ONNX Runtime, against float64 in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import contents, graph_of, operators, read_by, run
from compiler.group_norms import group_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.compile import load_program, one_picture
from controlrt.compiler.passes.blocked_group_norm import RUN, BlockedGroupNorm
from controlrt.compiler.verify import Verifier
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.profile import ShapeProfile

NORM = "y = GroupNormalization <num_groups = 4, epsilon = 0.001> (x, scale, bias)"
EPSILON = float(np.float32(0.001))
CHANNELS = 12


def norm(
    body: str = NORM,
    sides: str = "24, 16",
    rows: str = "rows",
    channels: int = CHANNELS,
    dtype: str = "float",
    inputs: str = "",
    scale: int = 0,
) -> ir.Model:
    """A graph of ``body`` over x, (rows, channels, sides), with scale and bias."""
    rng = np.random.default_rng(channels)
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    shape = f"{dtype}[{rows}, {channels}, {sides}]"
    size = scale or channels
    known = {"scale": rng.normal(1, 1, size).astype(kind), "bias": rng.normal(0, 1, size).astype(kind)}
    fed = {name: value for name, value in known.items() if f"] {name}" not in inputs}
    model = graph_of(f"{shape} x{inputs}", f"{shape} y", body, infer=False, **read_by(body, fed))
    for node in model.graph:
        node.outputs[0].type, node.outputs[0].shape = model.graph.inputs[0].type, model.graph.inputs[0].shape
    return model


def values(shape: tuple[int, ...], mean: float = 0.3, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


def excess(model: ir.Model, x: NDArray[np.float32], run_length: int = RUN) -> float:
    """Error over what roundings may cost: at most 1 is right.

    With r the largest |mean| / deviation of a group, some two of float32 for the root and the products, r for those of
    mean * factor and r^2 for those of q and m^2. In a longer run they grow as the root of its length.
    """
    before = norm(channels=x.shape[1]).graph.initializers  # as they were before any pass
    scale, bias = (tensor.numpy() for name in ("scale", "bias") if (tensor := before[name].const_value) is not None)
    expected = group_norm(x, scale, bias, 4, EPSILON)
    grouped = x.astype(np.float64).reshape(len(x), 4, -1)
    ratio = (np.abs(grouped.mean(2)) / np.sqrt(grouped.var(2) + EPSILON)).max()
    error = np.abs(run(model, x=x)["y"] - expected).max() / np.abs(expected).max()
    return float(error / (np.finfo(np.float32).eps * (2 + ratio + ratio**2) * max(1, run_length / RUN) ** 0.5))


@pytest.mark.parametrize("sides", [(1024, 1024), (64, 64), (24, 40), (8, 8), (1, 1), (17, 19), (4096,), (4, 6, 10)])
@pytest.mark.parametrize("mean", [0.3, 10.0])
@pytest.mark.parametrize("known", [True, False], ids=["known", "any"])
def test_it_is_exact(sides: tuple[int, ...], mean: float, known: bool) -> None:
    named = ", ".join(str(side) if known else f"side_{axis}" for axis, side in enumerate(sides))
    model = norm(sides=named)
    assert BlockedGroupNorm()(model).modified
    assert "GroupNormalization" not in operators(model)
    assert ("Shape" in operators(model)) != known
    x = values((1 if sides[0] == 1024 else 3, CHANNELS, *sides), mean)
    assert excess(model, x, RUN if known else sides[-1]) < 1


def test_one_side_that_is_known() -> None:
    model = norm(sides="height, 16")
    assert BlockedGroupNorm()(model).modified
    assert excess(model, values((2, CHANNELS, 24, 16))) < 1


def test_scale_and_bias_of_nodes() -> None:
    made = " ".join(
        f"{name} = Constant <value_floats = [{', '.join(['0.5', '2.0', '-1.0', '0.25'] * 3)}]> ()" for name in "sb"
    )
    body = f"{made} {NORM.replace('scale', 's').replace('bias', 'b')}"
    before, after = norm(body=body), norm(body=body)
    assert BlockedGroupNorm()(after).modified
    x = values((2, CHANNELS, 24, 16))
    np.testing.assert_allclose(run(after, x=x)["y"], run(before, x=x)["y"], rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3),
    of_a_group=st.integers(1, 5),
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mean=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_any_size(rows: int, of_a_group: int, sides: tuple[int, int], mean: float, seed: int) -> None:
    channels = 4 * of_a_group
    model = norm(sides=f"{sides[0]}, {sides[1]}", channels=channels)
    BlockedGroupNorm()(model)
    assert excess(model, values((rows, channels, *sides), mean, seed)) < 1


@pytest.mark.parametrize("sides", ["24, 16", "height, width"])
def test_nothing_but_constants(sides: str) -> None:
    """A variance that rounding leaves below zero has no root: the mean square of 3e4 is wrong by up to 50.
    mean * factor is up to 2e6, and the last place of that 0.25, of which two roundings are left beside the bias."""
    model = norm(sides=sides)
    BlockedGroupNorm()(model)
    heights = np.random.default_rng(0).uniform(1e4, 3e4, 64).astype(np.float32)
    x = np.broadcast_to(heights[:, None, None, None], (64, CHANNELS, 24, 16))
    found = run(model, x=np.ascontiguousarray(x))["y"]
    bias = norm().graph.initializers["bias"].const_value
    assert bias is not None
    np.testing.assert_allclose(found, np.broadcast_to(bias.numpy()[:, None, None], found.shape), rtol=0, atol=0.5)


def test_several() -> None:
    """Different epsilons, groups and sides beside each other, one of them read by two and one an output."""
    other = (
        NORM.replace("y =", "z =").replace("(x,", "(t,").replace("num_groups = 4, epsilon = 0.001", "num_groups = 2")
    )
    before, after = (norm(body=f"{NORM.replace('y =', 't =')} {other} y = Add (t, z)") for _ in range(2))
    assert BlockedGroupNorm()(after).modified
    x = values((2, CHANNELS, 24, 16))
    np.testing.assert_allclose(run(after, x=x)["y"], run(before, x=x)["y"], rtol=0, atol=1e-5)


def test_what_is_left() -> None:
    model = norm(sides="64, 64")
    BlockedGroupNorm()(model)
    RemoveUnusedNodesPass()(model)
    (y,) = model.graph.outputs
    assert (y.name, y.dtype, y.shape) == ("y", ir.DataType.FLOAT, ir.Shape(["rows", CHANNELS, 64, 64]))
    weights = {name: value for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    assert sum(tensor.size for value in weights.values() if (tensor := value.const_value) is not None) == (
        2 * CHANNELS + 2  # the length of a run, and epsilon
    )
    assert [value.const_value.numpy().item() for name, value in weights.items() if name.endswith(f"_{RUN}")] == [RUN]
    assert len({node.outputs[0].name for node in model.graph}) == len(model.graph)


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "half precision": {"dtype": "float16"},
    "fed scale": {"inputs": f", float[{CHANNELS}] scale"},
    "fed bias": {"inputs": f", float[{CHANNELS}] bias"},
    "computed scale": {"body": f"s = Abs (scale) {NORM.replace('scale', 's')}"},
    "another norm": {"body": "y = InstanceNormalization (x, scale, bias)"},
    "of another domain": {"body": NORM.replace("GroupN", "local.GroupN")},
    "a scale for each group": {"scale": 4},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = norm(**case)
    before = contents(model)
    assert not BlockedGroupNorm()(model).modified
    assert contents(model) == before


def test_second_time() -> None:
    model = norm()
    BlockedGroupNorm()(model)
    before = contents(model)
    assert not BlockedGroupNorm()(model).modified
    assert contents(model) == before


def test_a_picture_of_no_known_shape() -> None:
    model = norm()
    model.graph.inputs[0].shape = None
    assert not BlockedGroupNorm()(model).modified


@pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")
@pytest.mark.parametrize("sizes", ["128x128", "64-128x128"])
@pytest.mark.parametrize("name", ["unet", "controlnet.first", "vae_decoder", "vae_encoder"])
def test_traced_programs(exported: Path, name: str, sizes: str, tmp_path: Path) -> None:
    profile = ShapeProfile.parse(sizes, "1-4")
    program = next(program for program in read_manifest(exported).programs if program.name == name)
    before, after = (load_program(program, exported, profile) for _ in range(2))
    assert BlockedGroupNorm()(after).modified
    assert "GroupNormalization" not in operators(after)
    with Verifier(one_picture(profile), tmp_path) as verifier:
        verifier.check_pass(name, "BlockedGroupNorm", before, after)
