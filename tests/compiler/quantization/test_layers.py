"""Names of layers, whatever passes ran."""

from __future__ import annotations

import numpy as np
import pytest
from compiler.graphs import graph_of

from controlrt.compiler.passes.geglu import Geglu
from controlrt.compiler.passes.upsample_convolution import UpsampleConvolution
from controlrt.compiler.quantization.layers import layer_name, layers_of


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        ("unet.conv_in.weight", "unet.conv_in"),
        ("unet.up.conv.weight.01", "unet.up.conv"),
        ("unet.ff.net.0.proj.weight.half_1", "unet.ff.net.0.proj"),
        ("unet.proj_in.weight.matrix.half", "unet.proj_in"),
        ("unet.proj_in.weight.last.smooth", "unet.proj_in"),
        ("unet.resnets.11.conv1.weight", "unet.resnets.11.conv1"),
        ("controlnet.controlnet_down_blocks.10.weight.half", "controlnet.controlnet_down_blocks.10"),
        ("val_100", "val_100"),
    ],
)
def test_names(weight: str, name: str) -> None:
    assert layer_name(weight) == name


def test_gemm_and_its_axes() -> None:
    body = "y = Gemm <transB = 1> (x, w, b) z = Gemm (x, v, b)"
    model = graph_of(
        "float[3, 8] x", "float[3, 6] y, float[3, 6] z", body, w=np.ones((6, 8)), v=np.ones((8, 6)), b=[0.0] * 6
    )
    assert [(each.name, each.output_axis, each.input_axis) for each in layers_of(model.graph)] == [
        ("w", 0, 1),
        ("v", 1, 0),
    ]


def test_what_passes_make_of_a_layer_is_that_layer() -> None:
    body = "p = MatMul (x, w) v, g = Split <axis = 2, num_outputs = 2> (p) a = Gelu (g) y = Mul (v, a)"
    model = graph_of("float[1, 5, 6] x", "float[1, 5, 10] y", body, w=np.ones((6, 20)))
    assert Geglu()(model).modified
    assert [each.name for each in layers_of(model.graph)] == ["w", "w"]
    body = (
        'u = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x, , s) '
    )
    body += "y = Conv <pads = [1, 1, 1, 1]> (u, k)"
    sizes = {"s": np.array([1, 1, 2, 2], np.float32), "k": np.ones((4, 4, 3, 3))}
    model = graph_of("float[1, 4, 8, 8] x", "float[1, 4, 16, 16] y", body, **sizes)
    assert UpsampleConvolution()(model).modified
    assert [each.name for each in layers_of(model.graph)] == ["k"] * 4
