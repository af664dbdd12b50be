"""The convolution on rows in fours, in ONNX Runtime, against PyTorch in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import contents, graph_of, operators, run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.compile import load_program, one_picture
from controlrt.compiler.flops import count_flops
from controlrt.compiler.passes.winograd_convolution import MIN_CHANNELS, MIN_SIDE, WinogradConvolution
from controlrt.compiler.verify import MAX_RELATIVE_ERROR, Verifier
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.profile import ShapeProfile

IN, OUT = MIN_CHANNELS, MIN_CHANNELS + 3
CONV = "y = Conv <pads = [1, 1, 1, 1]> (x, W, b)"


def convolution(
    body: str = CONV,
    inputs: str | None = None,
    outputs: str | None = None,
    channels: tuple[int, int] = (IN, OUT),
    height: int | str = 16,
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
    dtype: Any = np.float32,
    infer: bool = True,
) -> ir.Model:
    """A graph of ``body`` over x, the weights W and the bias b."""
    before, after = channels
    rng = np.random.default_rng(0)
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    known = {
        "W": (rng.standard_normal((after, before // groups, *kernel)) / np.sqrt(9 * before)).astype(dtype),
        "b": rng.standard_normal(after).astype(dtype),
    }
    return graph_of(
        inputs or f"{kind}[n, {before}, {height}, w] x",
        outputs or f"{kind}[n, {after}, p, q] y",
        body,
        infer,
        **{name: value for name, value in known.items() if re.search(rf"\b{name}\b", body)},
    )


def picture(rows: int, height: int, width: int, channels: int = IN, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, channels, height, width), np.float32)


def exact(x: NDArray[np.float32], model: ir.Model) -> NDArray[np.float64]:
    """The convolution in float64."""
    torch = pytest.importorskip("torch")
    given = {name: value.const_value for name, value in model.graph.initializers.items()}
    weight, bias = (torch.from_numpy(t.numpy()).double() if (t := given.get(name)) else None for name in "Wb")
    found: NDArray[np.float64] = torch.nn.functional.conv2d(torch.from_numpy(x).double(), weight, bias, padding=1)
    return np.asarray(found)


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    """Errors are three times those of a plain sum of 1152 products at most, twice on average."""
    difference = np.abs(found - expected)
    largest = np.abs(expected).max()
    assert difference.max() < MAX_RELATIVE_ERROR * largest
    assert np.sqrt(np.square(difference).mean()) < 3e-7 * largest


FIRES: dict[str, dict[str, Any]] = {
    "bias": {},
    "no bias": {"body": "y = Conv <pads = [1, 1, 1, 1]> (x, W)"},
    "attributes in full": {
        "body": "y = Conv <pads = [1, 1, 1, 1], strides = [1, 1], dilations = [1, 1], group = 1, "
        'kernel_shape = [3, 3], auto_pad = "NOTSET"> (x, W, b)'
    },
    "computed bias": {"body": f"c = Abs (b) {CONV.replace('b)', 'c)')}"},
}


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_same_result(case: dict[str, Any]) -> None:
    before, after = convolution(**case), convolution(**case)
    assert WinogradConvolution()(after).modified
    assert operators(after).count("Conv") == 6
    for rows, width in ((1, 16), (3, 17)):
        x = picture(rows, 16, width)
        np.testing.assert_allclose(run(after, x=x)["y"], run(before, x=x)["y"], rtol=0, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 3),
    fours=st.integers(MIN_SIDE // 4, 8),
    width=st.integers(1, 40),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 99),
)
def test_like_pytorch(rows: int, fours: int, width: int, more: tuple[int, int], seed: int) -> None:
    channels = (MIN_CHANNELS + more[0], MIN_CHANNELS + more[1])
    model = convolution(channels=channels, height=4 * fours)
    x = picture(rows, 4 * fours, width, channels[0], seed)
    expected = exact(x, model)
    assert WinogradConvolution()(model).modified
    assert_close(run(model, x=x)["y"], expected)


def test_each_pixel_reaches_what_it_should() -> None:
    """One bright pixel gives the kernel, turned over, around it, and nothing anywhere else, at the borders too."""
    before, after = (convolution(body="y = Conv <pads = [1, 1, 1, 1]> (x, W)") for _ in range(2))
    WinogradConvolution()(after)
    for row in (0, 1, 4, 6, 11, 15):
        for column in (0, 7, 15):
            x = np.zeros((1, IN, 16, 16), np.float32)
            x[0, 5, row, column] = 1
            np.testing.assert_allclose(run(after, x=x)["y"], run(before, x=x)["y"], rtol=0, atol=1e-7)


def test_what_is_recorded() -> None:
    model = convolution()
    WinogradConvolution()(model)
    RemoveUnusedNodesPass()(model)
    for node in model.graph:
        assert node.outputs[0].dtype == ir.DataType.FLOAT, node
        assert node.outputs[0].shape is not None, node
        if node.op_type == "Conv":
            assert node.outputs[0].shape == ir.Shape(["n", OUT, 4, "w"]), node
    recorded = [node.outputs[0].shape for node in model.graph]
    for node in model.graph:
        node.outputs[0].shape = None
    ir.passes.common.ShapeInferencePass()(model)
    inferred = [node.outputs[0].shape for node in model.graph]
    for shape, found in zip(recorded, inferred, strict=True):
        assert shape is not None
        assert found is not None
        pairs = zip(shape, found, strict=True)
        assert all(one == other for one, other in pairs if isinstance(one, int) and isinstance(other, int))
    assert "W" not in model.graph.initializers
    assert [str(value.name) for value in model.graph.outputs] == ["y"]


def test_half_of_the_multiplications() -> None:
    before, after = convolution(), convolution()
    WinogradConvolution()(after)
    dims = {"n": 2, "w": 16}
    assert 2 * count_flops(after.graph, dims).total == count_flops(before.graph, dims).total


def test_a_shared_weight_is_transformed_once() -> None:
    first, second = CONV.replace("y =", "u ="), CONV.replace("y =", "t =").replace("x,", "v,")
    model = convolution(body=f"{first} v = Neg (x) {second} y = Add (u, t)")
    WinogradConvolution()(model)
    assert sum(name.startswith("W.winograd_") for name in model.graph.initializers) == 6
    assert operators(model).count("Conv") == 12


def test_weights_are_not_read_before_the_model_is_written() -> None:
    model = convolution()
    weight = model.graph.initializers["W"]
    tensor = weight.const_value
    assert tensor is not None
    reads = []

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return tensor

    weight.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name="W")
    assert WinogradConvolution()(model).modified
    assert not reads
    last = model.graph.initializers["W.winograd_5"].const_value
    assert last is not None
    np.testing.assert_array_equal(last.numpy(), tensor.numpy()[:, :, 2:])


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "height not in fours": {"height": 18},
    "height not known": {"height": "h"},
    "small picture": {"height": MIN_SIDE - 4},
    "narrow picture": {"inputs": f"float[n, {IN}, 16, {MIN_SIDE - 4}] x"},
    "few channels in": {"channels": (MIN_CHANNELS - 1, OUT)},
    "few channels out": {"channels": (IN, 4)},
    "stride": {"body": CONV.replace("<", "<strides = [2, 2], ")},
    "dilation": {"body": CONV.replace("<pads = [1, 1, 1, 1]", "<pads = [2, 2, 2, 2], dilations = [2, 2]")},
    "no padding": {"body": "y = Conv (x, W, b)"},
    "padding by name": {"body": 'y = Conv <auto_pad = "SAME_UPPER"> (x, W, b)'},
    "groups": {"channels": (2 * IN, 2 * IN), "groups": 2, "body": CONV.replace("<", "<group = 2, ")},
    "1x3": {"kernel": (1, 3), "body": CONV.replace("[1, 1, 1, 1]", "[0, 1, 0, 1]")},
    "5x5": {"kernel": (5, 5), "body": CONV.replace("[1, 1, 1, 1]", "[2, 2, 2, 2]")},
    "computed weight": {"body": f"v = Abs (W) {CONV.replace('W', 'v')}"},
    "fed weight": {
        "body": CONV.replace("W", "v"),
        "inputs": f"float[n, {IN}, 16, w] x, float[{OUT}, {IN}, 3, 3] v",
    },
    "half precision": {"dtype": np.float16},
    "of another domain": {"body": CONV.replace("Conv", "local.Conv"), "infer": False},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = convolution(**case)
    before = contents(model)
    assert not WinogradConvolution()(model).modified
    assert contents(model) == before


def test_second_time() -> None:
    model = convolution()
    WinogradConvolution()(model)
    before = contents(model)
    assert not WinogradConvolution()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")
@pytest.mark.parametrize("name", ["unet", "controlnet.first", "vae_decoder"])
def test_traced_programs(exported: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlrt.compiler.passes.winograd_convolution.MIN_CHANNELS", 8)
    profile = ShapeProfile.parse("128x128", "1-4")
    program = next(program for program in read_manifest(exported).programs if program.name == name)
    before, after = (load_program(program, exported, profile) for _ in range(2))
    assert WinogradConvolution()(after).modified
    with Verifier(one_picture(profile), tmp_path) as verifier:
        verifier.check_pass(name, "WinogradConvolution", before, after)
