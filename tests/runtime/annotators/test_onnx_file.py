"""Networks as annotators: small graphs whose result is known, of every layout that is understood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controlrt.runtime.annotators import annotate, open_annotator
from controlrt.runtime.errors import ParameterError, SourceError, UnknownNameError
from sample_pictures import noise, scene

TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64, "uint8": np.uint8}
PLAIN = {"mean": 0, "std": 1, "output_range": "unit"}


def graph(path: Path, inputs: str, outputs: str, body: str) -> Path:
    onnx = pytest.importorskip("onnx", reason="the graphs are written with onnx")
    pytest.importorskip("cv2", reason="without the extra [annotate] there is no OpenCV")
    text = f'<ir_version: 8, opset_import: ["" : 18]> g ({inputs}) => ({outputs}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def identity(path: Path, shape: str, kind: str = "float") -> Path:
    return graph(path, f"{kind}{shape} x", f"{kind}{shape} y", "y = Identity (x)")


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("shape", ["[1,3,H,W]", "[1,H,W,3]", "[N,3,32,48]", "[1,3,32,48]", "[1,32,48,3]", "[a,b,c,d]"])
def test_a_network_that_does_nothing_gives_the_picture_back(tmp_path: Path, kind: str, shape: str) -> None:
    annotator = open_annotator("same", identity(tmp_path / "same.onnx", shape, kind))
    pixels = noise(32, 48)
    given = {**PLAIN, "input_size": "48x32"}
    if kind == "uint8":  # bytes go in and out as they are, so 255 of them is beyond 1
        np.testing.assert_array_equal(annotate(annotator, pixels, **given), np.where(pixels > 0, 255, 0))
    else:
        atol = 1 if kind == "float16" else 0
        np.testing.assert_allclose(annotate(annotator, pixels, **given), pixels, atol=atol)


def test_mean_and_std_are_per_channel(tmp_path: Path) -> None:
    annotator = open_annotator("same", identity(tmp_path / "same.onnx", "[1,3,32,48]"))
    pixels = noise(32, 48)
    mean, std = (0.1, 0.2, 0.3), (2.0, 1.0, 1.5)
    found = annotate(annotator, pixels, mean="0.1,0.2,0.3", std=list(std), output_range="unit")
    expected = np.clip((pixels / 255 - mean) / std, 0, 1) * 255
    np.testing.assert_allclose(found, expected, atol=0.51)
    stretched = np.asarray(annotate(annotator, pixels))
    normal = (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(stretched, (normal - normal.min()) / np.ptp(normal) * 255, atol=0.51)


def test_depth_is_stretched_turned_over_and_sized_back(tmp_path: Path) -> None:
    """A network that answers with the sum of the channels at a quarter of the size."""
    path = graph(
        tmp_path / "depth.onnx",
        "float[1,3,H,W] image",
        "float[1,h,w] depth",
        "four = Constant <value = int64[1] {4}> () axes = Constant <value = int64[1] {1}> ()"
        "small = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (image)"
        "depth = ReduceSum <keepdims = 0> (small, axes)",
    )
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([x, x, x + y], axis=-1).astype(np.uint8)
    found = np.asarray(annotate(open_annotator("depth", path), pixels, mean=0, std=1, processor_res=64))
    assert found.shape == (64, 96, 3)
    assert (found == found[..., :1]).all()
    expected = pixels.sum(axis=2)
    low, high = 4.5, 3 * 93.5 + 61.5  # the least and largest mean of 4x4 pixels
    inner = (slice(8, -8), slice(8, -8))
    # OpenCV's bicubic kernel gives a slope back to within a third of a pixel of the network's, of 4 here
    np.testing.assert_allclose(found[..., 0][inner], ((expected - low) / (high - low) * 255)[inner], atol=2.5)
    over = np.asarray(annotate(open_annotator("d", path), pixels, mean=0, std=1, processor_res=64, invert=True))
    np.testing.assert_allclose(over.astype(int), 255 - found.astype(int), atol=1)


def test_open_sides_follow_processor_res_and_multiple(tmp_path: Path) -> None:
    """The network answers with its own width and height in its pixels."""
    path = graph(
        tmp_path / "size.onnx",
        "float[1,3,H,W] x",
        "float[1,1,H,W] y",
        "size = Shape <start = 2> (x) sides = Cast <to = 1> (size)"
        "zero = Constant <value = float {0.0}> () one = Constant <value = int64[1] {1}> ()"
        "first = Constant <value = int64 {0}> () second = Constant <value = int64 {1}> ()"
        "height = Gather (sides, first) width = Gather (sides, second)"
        "thousand = Constant <value = float {1000.0}> () h = Div (height, thousand)"
        "flat = ReduceMax <keepdims = 1> (x, one) nothing = Mul (flat, zero) y = Add (nothing, h)",
    )
    annotator = open_annotator("size", path)

    def height(**given: object) -> int:
        made = np.asarray(annotate(annotator, np.zeros((50, 100, 3), np.uint8), output_range="unit", **given))
        assert made.shape == (50, 100, 3)
        return round(made[0, 0, 0] / 255 * 1000)

    assert height() == pytest.approx(512, abs=4)
    assert height(processor_res=200) == pytest.approx(192, abs=4)
    assert height(processor_res=200, multiple=14) == pytest.approx(196, abs=4)
    assert height(processor_res=1) == pytest.approx(32, abs=4)
    assert height(input_size="64x300") == pytest.approx(300, abs=4)
    assert height(width=None, pixel_perfect=False) == pytest.approx(512, abs=4)


@pytest.mark.parametrize(
    ("output_range", "formula"), [("signed", lambda y: (y + 1) / 2), ("logit", lambda y: 1 / (1 + np.exp(-y)))]
)
def test_ranges(tmp_path: Path, output_range: str, formula: object) -> None:
    annotator = open_annotator("same", identity(tmp_path / "same.onnx", "[1,3,24,24]"))
    pixels = noise(24, 24)
    found = annotate(annotator, pixels, mean=0.5, std=0.25, output_range=output_range)
    np.testing.assert_allclose(found, 255 * np.clip(formula((pixels / 255 - 0.5) / 0.25), 0, 1), atol=0.51)


def test_channel_order_and_named_output(tmp_path: Path) -> None:
    """One output is the first channel that the network sees, the other the last; they lie channels first and last."""
    path = graph(
        tmp_path / "two.onnx",
        "float[1,3,20,30] x",
        "float[1,1,20,30] first, float[1,20,30,1] last",
        "at = Constant <value = int64[1] {1}> () zero = Constant <value = int64[1] {0}> ()"
        "two = Constant <value = int64[1] {2}> () three = Constant <value = int64[1] {3}> ()"
        "first = Slice (x, zero, at, at) channel = Slice (x, two, three, at)"
        "last = Transpose <perm = [0, 2, 3, 1]> (channel)",
    )
    annotator, pixels = open_annotator("two", path), scene(20, 30)
    for given, channel in (
        ({}, 0),
        ({"output_name": "first"}, 0),
        ({"output_name": "last"}, 2),
        ({"channel_order": "bgr"}, 2),
        ({"channel_order": "bgr", "output_name": "last"}, 0),
    ):
        found = np.asarray(annotate(annotator, pixels, **PLAIN, **given))
        np.testing.assert_array_equal(found, np.stack([pixels[..., channel]] * 3, axis=-1))
    with pytest.raises(UnknownNameError, match="did you mean 'first'"):
        annotate(annotator, pixels, output_name="firts")


def test_a_grey_network_sees_the_luma(tmp_path: Path) -> None:
    annotator = open_annotator("grey", identity(tmp_path / "grey.onnx", "[1,1,20,30]"))
    pixels = scene(20, 30)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(np.asarray(annotate(annotator, pixels, **PLAIN))[..., 0], luma, atol=0.51)
    even = np.asarray(annotate(annotator, np.full((5, 7, 3), 9, np.uint8)))
    assert even.shape == (5, 7, 3)
    assert not even.any()  # nothing to stretch


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("float[1,3,H,W] x, float[1] t", "inputs x, t; an annotator has one"),
        ("float[1,3,H] x", "shape"),
        ("float[2,3,H,W] x", r"shape \[2, 3, 'H', 'W'\]"),
        ("float[1,4,16,16] x", "1 or 3 channels"),
        ("int64[1,3,H,W] x", "type tensor"),
    ],
)
def test_graphs_that_take_no_picture(tmp_path: Path, inputs: str, says: str) -> None:
    path = graph(tmp_path / "g.onnx", inputs, f"{inputs.split('[')[0]}[a,b,c,d] y", "y = Identity (x)")
    with pytest.raises(SourceError, match=says):
        open_annotator("g", path)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent.onnx is not a file.*--annotator depth=FILE.onnx"):
        open_annotator("depth", tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(SourceError, match="cannot load"):
        open_annotator("depth", tmp_path / "text.onnx")
    pixels = noise(8, 8)
    vector = graph(tmp_path / "v.onnx", "float[1,3,H,W] x", "float[1,n] y", "y = Flatten (x)")
    with pytest.raises(SourceError, match="output of shape"):
        annotate(open_annotator("v", vector), pixels, input_size="8x9")
    infinite = graph(tmp_path / "i.onnx", "float[1,3,8,8] x", "float[1,3,8,8] y", "y = Log (x)")
    with pytest.raises(SourceError, match="not finite"):
        annotate(open_annotator("i", infinite), np.zeros((8, 8, 3), np.uint8), mean=0, std=1)
    half = graph(
        tmp_path / "r.onnx",
        "float[1,3,H,W] x",
        "float[1,3,8,8] y",
        "shape = Constant <value = int64[4] {1, 3, 8, 8}> () y = Reshape (x, shape)",
    )
    with pytest.raises(SourceError, match="does not run at 32x32"):
        annotate(open_annotator("r", half), pixels, processor_res=8)
    with pytest.raises(ParameterError, match="one number, or three"):
        annotate(open_annotator("i", infinite), pixels, mean="1,2")
