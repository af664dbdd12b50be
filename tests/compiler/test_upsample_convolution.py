"""The folded upsampling against numpy in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.passes.upsample_convolution import REPEATS, UpsampleConvolution

NEAREST = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
"""What PyTorch writes for F.interpolate(mode="nearest")."""
RESIZE = f"u = Resize <{NEAREST}> (x, , scales)"
CONV = "y = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (u, W, b)"
SYMBOLIC = "[rows, 5, h, w]"
DTYPES = {"float": np.float32, "float16": np.float16}


def model_of(
    body: str = f"{RESIZE} {CONV}",
    shape: str = SYMBOLIC,
    dtype: str = "float",
    outputs: str = "{dtype}[rows, channels, a, b] y",
    inputs: str = "",
    infer: bool = True,
    **constants: Any,
) -> ir.Model:
    """A graph of ``body`` over x and the constants, which are the weights W and b and the scales unless given."""
    rng = np.random.default_rng(0)
    constants = {
        "W": rng.standard_normal((7, 5, 3, 3)),
        "b": rng.standard_normal(7),
        "scales": np.array([1, 1, 2, 2], np.float32),
        **constants,
    }
    signature = f"({{dtype}}{shape} x{inputs}) => ({outputs})".replace("{dtype}", dtype)
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 23]> agraph {signature} {{ {body} }}')
    read = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, array in constants.items():
        if name in read:
            array = array.astype(DTYPES[dtype]) if array.dtype == np.float64 else array
            value = read[name]
            value.const_value = ir.tensor(array, name=name)
            value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
            model.graph.register_initializer(value)
    if infer:
        ir.passes.common.ShapeInferencePass()(model)
    return model


def run(model: ir.Model, directory: Path, **inputs: Any) -> list[Any]:
    ir.save(model, directory / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def reference(x: Any, model: ir.Model) -> Any:
    """Upsampling and convolution by their definitions."""
    weight, bias = (model.graph.initializers[name].const_value.numpy().astype(np.float64) for name in ("W", "b"))
    upsampled = x.astype(np.float64).repeat(2, axis=2).repeat(2, axis=3)
    padded = np.pad(upsampled, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def contents(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


FOLDED = ["Conv"] * 4 + ["Concat", "DepthToSpace"]


@pytest.mark.parametrize(
    "size", [(1, 5, 1, 1), (2, 5, 4, 4), (3, 5, 2, 9), (2, 5, 16, 1)], ids=lambda size: "x".join(map(str, size))
)
@pytest.mark.parametrize(("dtype", "bound"), [("float", 1e-6), ("float16", 2**-9)])
def test_same_result(size: tuple[int, ...], dtype: str, bound: float, tmp_path: Path) -> None:
    """45 products in another order, each sum rounded to 2^-24; in half, taps and result are rounded once to 2^-11."""
    model = model_of(dtype=dtype)
    x = np.random.default_rng(1).standard_normal(size).astype(DTYPES[dtype])
    expected = reference(x, model)
    assert UpsampleConvolution()(model).modified
    assert operators(model) == FOLDED
    (found,) = run(model, tmp_path, x=x)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())


@pytest.mark.parametrize(
    ("transformation", "rounding"),
    list(
        itertools.product(
            ["asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel"],
            ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"],
        )
    ),
)
def test_fires_where_resize_repeats(transformation: str, rounding: str, tmp_path: Path) -> None:
    """ONNX Runtime's Resize says which of the modes repeat every element once."""
    mode = f'coordinate_transformation_mode = "{transformation}", nearest_mode = "{rounding}"'
    model = model_of(f"y = Resize <{mode}> (x, , scales)")
    x = np.arange(5 * 4 * 6, dtype=np.float32).reshape(1, 5, 4, 6)
    (resized,) = run(model, tmp_path, x=x)
    repeats = np.array_equal(resized, x.repeat(2, axis=2).repeat(2, axis=3))
    assert repeats == ((transformation, rounding) in REPEATS)
    assert UpsampleConvolution()(model_of(f"u = Resize <{mode}> (x, , scales) {CONV}")).modified == repeats


SIZES = f"u = Resize <{NEAREST}> (x, , , sizes) {CONV}"
COMPUTED_SIZES = f"""
    kept = Shape <start = 0, end = 2> (x) sides = Shape <start = 2, end = 4> (x)
    two = Constant <value_int = 2> () doubled = Mul (sides, two)
    sizes = Concat <axis = 0> (kept, doubled) {SIZES}"""
FIRES: dict[str, dict[str, Any]] = {
    "fixed sides": {"shape": "[rows, 5, 4, 6]"},
    "fixed": {"shape": "[2, 5, 4, 6]"},
    "no shapes": {"infer": False},
    "defaults": {"body": f"u = Resize (x, , scales) {CONV}"},
    "scales of axes": {
        "body": f"u = Resize <{NEAREST}, axes = [-1, 2]> (x, , two) {CONV}",
        "two": np.array([2, 2], np.float32),
    },
    "constant sizes": {"body": SIZES, "shape": "[2, 5, 4, 6]", "sizes": np.array([2, 5, 8, 12])},
    "constant sizes, no shapes": {
        "body": SIZES,
        "shape": "[2, 5, 4, 6]",
        "sizes": np.array([2, 5, 8, 12]),
        "infer": False,
    },
    "no bias": {"body": f"{RESIZE} {CONV.replace(', b)', ')')}", "b": np.zeros(7)},
    "all attributes": {
        "body": f"{RESIZE} y = Conv <pads = [1, 1, 1, 1], strides = [1, 1], dilations = [1, 1], group = 1, "
        'auto_pad = "NOTSET"> (u, W, b)'
    },
}


@pytest.mark.parametrize("case", FIRES.values(), ids=FIRES)
def test_variants(case: dict[str, Any], tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((2, 5, 4, 6), np.float32)
    (expected,) = run(model_of(**case), tmp_path, x=x)
    model = model_of(**case)
    assert UpsampleConvolution()(model).modified
    assert operators(model) == FOLDED
    (found,) = run(model, tmp_path, x=x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_sizes_of_symbolic_sides(tmp_path: Path) -> None:
    """The sizes are computed from the shape; that they double is what the recorded shapes say."""
    model = model_of(COMPUTED_SIZES, infer=False)
    resized = next(node for node in model.graph if node.op_type == "Resize").outputs[0]
    assert not UpsampleConvolution()(model).modified
    model.graph.inputs[0].shape = ir.Shape(["rows", 5, "h//2 + 1", "w"])
    resized.shape = ir.Shape(["rows", 5, "2*(h//2) + 1", "2*w"])
    assert not UpsampleConvolution()(model).modified
    resized.shape = ir.Shape(["rows", 5, "2*(h//2) + 2", "2*w"])
    assert UpsampleConvolution()(model).modified
    for size in ((1, 5, 3, 2), (2, 5, 1, 7)):
        x = np.random.default_rng(1).standard_normal(size, np.float32)
        expected = reference(x, model)
        (found,) = run(model, tmp_path, x=x)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_what_is_recorded() -> None:
    model = model_of()
    UpsampleConvolution()(model)
    RemoveUnusedNodesPass()(model)
    shapes = [node.outputs[0].shape for node in model.graph]
    assert shapes[:4] == [ir.Shape(["rows", 7, "h", "w"])] * 4
    assert shapes[4] == ir.Shape(["rows", 28, "h", "w"])
    assert {node.outputs[0].dtype for node in model.graph} == {ir.DataType.FLOAT}
    assert model.graph.outputs[0].name == "y"
    assert sorted(model.graph.initializers) == ["W.00", "W.01", "W.10", "W.11", "b"]
    assert all(model.graph.initializers[f"W.{phase}"].shape == [7, 5, 2, 2] for phase in ("00", "01", "10", "11"))

    model = model_of(f"{RESIZE} {CONV.replace('y =', 'z =')} y = Relu (z)", shape="[rows, 5, 4, 6]", infer=False)
    UpsampleConvolution()(model)
    assert next(node for node in model.graph if node.op_type == "Relu").inputs[0].shape == ir.Shape(["rows", 7, 8, 12])


def test_taps_are_summed_once_and_late() -> None:
    """1 + 2^-11 + 2^-12 + 2^-12 is 1 where each sum is rounded to half, and 1 + 2^-10 where only the last one is."""
    taps = np.zeros((1, 5, 3, 3), np.float16)
    taps[0, 0, 1:, 1:] = [[1, 2**-11], [2**-12, 2**-12]]
    model = model_of(dtype="float16", W=taps, b=np.zeros(1))
    weight = model.graph.initializers["W"]
    reads = []

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(taps)

    weight.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT16, shape=ir.Shape(taps.shape), name="W")
    assert UpsampleConvolution()(model).modified
    assert not reads
    kernel = model.graph.initializers["W.00"].const_value
    assert kernel is not None
    assert kernel.numpy()[0, 0, 1, 1] == np.float16(1 + 2**-10)


OTHER = np.random.default_rng(2)
NEAR_MISSES: dict[str, dict[str, Any]] = {
    "scale 3": {"scales": np.array([1, 1, 3, 3], np.float32)},
    "scale 2 and 1": {"scales": np.array([1, 1, 2, 1], np.float32)},
    "scaled channels": {"scales": np.array([1, 2, 2, 2], np.float32), "W": OTHER.standard_normal((7, 10, 3, 3))},
    "almost 2": {"scales": np.array([1, 1, 2, 2.1], np.float32)},
    "fed scales": {"body": f"u = Resize <{NEAREST}> (x, , fed) {CONV}", "inputs": ", float[4] fed"},
    "linear": {"body": f'u = Resize <mode = "linear"> (x, , scales) {CONV}'},
    "cubic": {"body": f'u = Resize <mode = "cubic"> (x, , scales) {CONV}'},
    "other rounding": {"body": f'u = Resize <nearest_mode = "floor"> (x, , scales) {CONV}'},
    "corners aligned": {"body": f'u = Resize <coordinate_transformation_mode = "align_corners"> (x, , scales) {CONV}'},
    "other sizes": {"body": SIZES, "shape": "[2, 5, 4, 6]", "sizes": np.array([2, 5, 8, 13])},
    "sizes of unknown sides": {"body": SIZES, "sizes": np.array([2, 5, 8, 12])},
    "aspect ratio kept": {
        "body": SIZES.replace("floor", 'floor", keep_aspect_ratio_policy = "not_larger'),
        "shape": "[2, 5, 4, 6]",
        "sizes": np.array([2, 5, 8, 12]),
    },
    "two readers": {"body": f"{RESIZE} {CONV.replace('y =', 'c =')} s = ReduceSum (u) y = Add (c, s)"},
    "two convolutions": {"body": f"{RESIZE} {CONV.replace('y =', 'c =')} {CONV.replace('y =', 'd =')} y = Add (c, d)"},
    "upsampled is an output": {"outputs": "{dtype}[rows, channels, a, b] y, {dtype}[rows, channels, a, b] u"},
    "something between": {"body": f"{RESIZE.replace('u =', 't =')} u = Relu (t) {CONV}"},
    "upsampled weights": {
        "body": f"u = Resize <{NEAREST}> (x, , scales) y = Conv <pads = [1, 1, 1, 1]> (W, u)",
        "shape": "[4, 5, 3, 3]",
    },
    "groups": {
        "body": f"{RESIZE} {CONV.replace('<', '<group = 5, ')}",
        "W": OTHER.standard_normal((5, 1, 3, 3)),
        "b": np.zeros(5),
    },
    "stride": {"body": f"{RESIZE} {CONV.replace('<', '<strides = [2, 2], ')}"},
    "dilation": {"body": f"{RESIZE} {CONV.replace('<', '<dilations = [2, 2], ')}"},
    "no padding": {"body": f"{RESIZE} y = Conv <kernel_shape = [3, 3]> (u, W, b)"},
    "uneven padding": {"body": f"{RESIZE} y = Conv <pads = [1, 1, 1, 0]> (u, W, b)"},
    "automatic padding": {"body": f'{RESIZE} y = Conv <auto_pad = "SAME_UPPER"> (u, W, b)'},
    "1x1": {"body": f"{RESIZE} y = Conv (u, W, b)", "W": OTHER.standard_normal((7, 5, 1, 1))},
    "5x5": {"body": f"{RESIZE} y = Conv <pads = [1, 1, 1, 1]> (u, W, b)", "W": OTHER.standard_normal((7, 5, 5, 5))},
    "computed weights": {"body": f"{RESIZE} V = Abs (W) {CONV.replace('W', 'V')}"},
    "transposed convolution": {
        "body": f"{RESIZE} {CONV.replace('Conv', 'ConvTranspose')}",
        "W": OTHER.standard_normal((5, 7, 3, 3)),
    },
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = model_of(**case)
    before = contents(model)
    assert not UpsampleConvolution()(model).modified
    assert contents(model) == before


def test_second_time() -> None:
    model = model_of()
    UpsampleConvolution()(model)
    before = contents(model)
    assert not UpsampleConvolution()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("sizes", [False, True], ids=["scale_factor", "output_size"])
def test_diffusers_upsampler(sizes: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from diffusers.models.upsampling import Upsample2D

    class Upsampler(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.upsample = Upsample2D(5, use_conv=True, out_channels=7)

        def forward(self, x: Any) -> Any:
            return self.upsample(x, (2 * x.shape[2], 2 * x.shape[3]) if sizes else None)

    torch.manual_seed(0)
    module, dim = Upsampler().eval(), torch.export.Dim
    dynamic = ({0: dim("rows", min=1, max=8), 2: dim("h", min=2, max=32), 3: dim("w", min=2, max=32)},)
    x = torch.randn(2, 5, 4, 6)
    program = torch.onnx.export(module, (x,), dynamo=True, opset_version=23, dynamic_shapes=dynamic, verbose=False)
    assert UpsampleConvolution()(program.model).modified
    RemoveUnusedNodesPass()(program.model)
    assert operators(program.model) == FOLDED
    x = torch.randn(3, 5, 8, 2)
    (found,) = run(program.model, tmp_path, x=x.numpy())
    expected = module(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
