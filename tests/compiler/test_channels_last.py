"""Convolutions and group norms before and after their channels are last, in NumPy against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.cuda_operators import run_in_numpy
from compiler.graphs import contents, graph_of, operators, run
from hypothesis import given, settings
from hypothesis import strategies as st

from controlrt.compiler.passes.channels_last import ChannelsLast

RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.normal(0, 1, (6, 4, 3, 3)), RNG.normal(0, 1, 6)
GAMMA, BETA = RNG.normal(1, 1, 8), RNG.normal(0, 1, 8)
NORM = "num_groups = 2, epsilon = 0.01"


def convolution(attributes: str = "pads = [1, 1, 1, 1]", body: str = "y = Conv <{}> (x, w, b)", **new: Any) -> ir.Model:
    constants = {"w": WEIGHT, "b": BIAS} | new
    used = {name: array for name, array in constants.items() if array is not None}
    return graph_of("float[rows, 4, 9, 7] x", "float[rows, 6, h, v] y", body.replace("{}", attributes), **used)


def norm(body: str = f"y = GroupNormalization <{NORM}> (x, gamma, beta)", kind: str = "float", **new: Any) -> ir.Model:
    constants = {"gamma": GAMMA, "beta": BETA} | new
    dtype = np.float32 if kind == "float" else np.float16
    typed = {name: np.asarray(array, dtype) for name, array in constants.items()}
    model = graph_of(f"{kind}[rows, 8, 5, 6] x", f"{kind}[rows, 8, 5, 6] y", body, **typed)
    for node in model.graph:  # onnx infers no shape of a group norm
        node.outputs[0].shape, node.outputs[0].type = model.graph.inputs[0].shape, model.graph.inputs[0].type
    return model


def picture(rows: int, channels: int, *sides: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(rows).normal(1, 2, (rows, channels, *sides)).astype(dtype)


@settings(max_examples=20, deadline=None)
@given(
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    stride=st.integers(1, 2),
    kernel=st.sampled_from([(1, 1), (2, 2), (3, 3), (3, 1)]),
    bias=st.booleans(),
    rows=st.integers(1, 2),
)
def test_same_convolution(pads: tuple[int, ...], stride: int, kernel: tuple[int, int], bias: bool, rows: int) -> None:
    attributes = f"pads = {list(pads)}, strides = [{stride}, {stride}], kernel_shape = {list(kernel)}"
    body = "y = Conv <{}> (x, w, b)" if bias else "y = Conv <{}> (x, w)"
    new = {"w": RNG.normal(0, 1, (6, 4, *kernel)), "b": BIAS if bias else None}
    before, after = (convolution(attributes, body, **new) for _ in range(2))
    assert ChannelsLast()(after).modified
    assert operators(after) == ["Transpose", "NhwcConv", "Transpose"]
    x = picture(rows, 4, 9, 7)
    expected = run(before, x=x)["y"]
    np.testing.assert_allclose(run_in_numpy(after, x=x)["y"], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


SILU = f"t = GroupNormalization <{NORM}> (x, gamma, beta) s = Sigmoid (t)"


@pytest.mark.parametrize("product", ["y = Mul (t, s)", "y = Mul (s, t)"])
def test_same_norm_with_silu(product: str) -> None:
    before, after = (norm(f"{SILU} {product}") for _ in range(2))
    assert ChannelsLast()(after).modified
    assert operators(after) == ["Transpose", "GroupNorm", "Transpose"]
    assert after.graph[1].attributes.get_int("activation") == 1
    x = picture(2, 8, 5, 6)
    expected = run(before, x=x)["y"]
    np.testing.assert_allclose(run_in_numpy(after, x=x)["y"], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_same_norm(kind: str) -> None:
    before, after = (norm(kind=kind) for _ in range(2))
    assert ChannelsLast()(after).modified
    assert operators(after) == ["Transpose", "GroupNorm", "Transpose"]
    scale, bias = after.graph[1].inputs[1:]
    assert scale is not None
    assert bias is not None
    assert {scale.dtype, bias.dtype} == {ir.DataType.FLOAT}
    dtype, exact = (np.float32, 3e-6) if kind == "float" else (np.float16, 2e-3)
    x = picture(2, 8, 5, 6, dtype=dtype)
    expected = run(before, x=x)["y"].astype(np.float32)
    found = run_in_numpy(after, x=x)["y"].astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=exact * np.abs(expected).max())


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid (t) u = Mul (t, s) y = Add (u, t)",
        "s = Sigmoid (t) u = Mul (t, s) y = Add (u, s)",
        "s = Sigmoid (x) u = Mul (t, s) y = Add (u, t)",
        "s = Tanh (t) y = Mul (t, s)",
    ],
    ids=["norm read elsewhere", "sigmoid read elsewhere", "sigmoid of something else", "no sigmoid"],
)
def test_what_is_no_silu(body: str) -> None:
    before, after = (norm(f"t = GroupNormalization <{NORM}> (x, gamma, beta) {body}") for _ in range(2))
    assert ChannelsLast()(after).modified
    (fused,) = (node for node in after.graph if node.op_type == "GroupNorm")
    assert fused.attributes.get_int("activation") == 0
    x = picture(1, 8, 5, 6)
    np.testing.assert_allclose(run_in_numpy(after, x=x)["y"], run(before, x=x)["y"], rtol=0, atol=1e-5)


def test_same_norm_of_pixels_in_a_row() -> None:
    before, after = (
        graph_of(
            "float[rows, 8, 30] x",
            "float[rows, 8, 30] y",
            f"y = GroupNormalization <{NORM}> (x, gamma, beta)",
            gamma=GAMMA,
            beta=BETA,
        )
        for _ in range(2)
    )
    assert ChannelsLast()(after).modified
    assert operators(after) == ["Unsqueeze", "Transpose", "GroupNorm", "Transpose", "Squeeze"]
    x = picture(2, 8, 30)
    expected = run(before, x=x)["y"]
    np.testing.assert_allclose(run_in_numpy(after, x=x)["y"], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def of_rank_three() -> ir.Model:
    return graph_of("float[rows, 4, 9] x", "float[rows, 6, 7] y", "y = Conv (x, w)", w=WEIGHT[..., 0])


NEAR_MISSES = {
    "a line, not a picture": of_rank_three,
    "groups": lambda: graph_of(
        "float[rows, 4, 9, 7] x", "float[rows, 4, 7, 5] y", "y = Conv <group = 4> (x, w)", w=WEIGHT[:4, :1]
    ),
    "weights that are computed": lambda: graph_of(
        "float[rows, 4, 9, 7] x, float[6, 4, 3, 3] w", "float[rows, 6, 7, 5] y", "y = Conv (x, w)"
    ),
    "padding left to the runtime": lambda: convolution('auto_pad = "SAME_UPPER"'),
    "one channel in a group": lambda: norm("y = GroupNormalization <num_groups = 8> (x, gamma, beta)"),
    "norm of a volume": lambda: graph_of(
        "float[rows, 8, 5, 2, 2] x",
        "float[rows, 8, 5, 2, 2] y",
        f"y = GroupNormalization <{NORM}> (x, gamma, beta)",
        gamma=GAMMA,
        beta=BETA,
    ),
}


@pytest.mark.parametrize("make", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(make: Any) -> None:
    model = make()
    before = contents(model)
    assert not ChannelsLast()(model).modified
    assert contents(model) == before


def test_idempotent() -> None:
    model = convolution()
    ChannelsLast()(model)
    before = contents(model)
    assert not ChannelsLast()(model).modified
    assert contents(model) == before


def test_weights_that_two_read_are_transposed_once() -> None:
    model = graph_of(
        "float[rows, 4, 9, 7] x", "float[rows, 6, 7, 5] z", "y = Conv (x, w) u = Conv (x, w) z = Add (y, u)", w=WEIGHT
    )
    ChannelsLast()(model)
    assert len({node.inputs[1] for node in model.graph if node.op_type == "NhwcConv"}) == 1
