"""FLOPs against PyTorch's own counter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from controlrt.compiler.flops import FlopCountError, GraphSize, count_flops, graph_size, infer_shapes

torch = pytest.importorskip("torch", reason="the reference counts in PyTorch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402


class Function(nn.Module):
    """A module of a function, which is what torch.onnx.export takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def reference(function: Callable[..., Any], *inputs: Any) -> int:
    """What PyTorch counts. It knows no fused attention on CPUs, so attention runs as its two products."""
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def export(module: nn.Module, *inputs: Any, dynamic_shapes: Any = None) -> ir.Graph:
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(), inputs, dynamo=True, opset_version=23, dynamic_shapes=dynamic_shapes, verbose=False
        )
    return program.model.graph


def text(inputs: str, body: str, opset: int = 23) -> ir.Graph:
    """A graph of ``body`` that makes y; only its inputs have shapes."""
    header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
    return ir.from_onnx_text(f"{header} agraph ({inputs}) => (float y) {{ {body} }}").graph


def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
    return F.scaled_dot_product_attention(query, key, value, **options)


MODULES = {
    "conv": (nn.Conv2d(3, 8, 3, padding=1), [(2, 3, 9, 7)], "Conv"),
    "conv without padding": (nn.Conv2d(3, 8, (3, 5), bias=False), [(1, 3, 9, 7)], "Conv"),
    "conv 1d": (nn.Conv1d(3, 8, 3), [(2, 3, 9)], "Conv"),
    "conv grouped": (nn.Conv2d(6, 9, 3, groups=3), [(2, 6, 9, 7)], "Conv"),
    "conv depthwise": (nn.Conv2d(6, 6, 3, groups=6), [(2, 6, 9, 7)], "Conv"),
    "conv strided": (nn.Conv2d(3, 8, 3, stride=2, padding=1), [(2, 3, 9, 8)], "Conv"),
    "conv dilated": (nn.Conv2d(3, 8, 3, dilation=2), [(2, 3, 9, 7)], "Conv"),
    "conv transpose": (nn.ConvTranspose2d(3, 8, 4, stride=2, padding=1), [(2, 3, 5, 7)], "ConvTranspose"),
    "conv transpose grouped": (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), [(2, 6, 5, 7)], "ConvTranspose"),
    "linear 2d": (nn.Linear(6, 9), [(4, 6)], "Gemm"),
    "linear 3d": (nn.Linear(6, 9), [(2, 4, 6)], "MatMul"),
    "matmul batched": (Function(torch.matmul), [(2, 3, 4, 5), (2, 3, 5, 6)], "MatMul"),
    "matmul broadcast": (Function(torch.matmul), [(2, 1, 4, 5), (3, 5, 6)], "MatMul"),
    "attention": (Function(attend), [(2, 3, 8, 4), (2, 3, 5, 4), (2, 3, 5, 4)], "Attention"),
    "attention causal": (
        Function(lambda q, k, v: attend(q, k, v, is_causal=True)),
        [(2, 3, 8, 4), (2, 3, 8, 4), (2, 3, 8, 4)],
        "Attention",
    ),
    "attention masked": (
        Function(lambda q, k, v, mask: attend(q, k, v, attn_mask=mask)),
        [(2, 3, 8, 4), (2, 3, 5, 4), (2, 3, 5, 4), (2, 1, 8, 5)],
        "Attention",
    ),
    "attention grouped": (
        Function(lambda q, k, v: attend(q, k, v, enable_gqa=True)),
        [(2, 6, 8, 4), (2, 2, 5, 4), (2, 2, 5, 4)],
        "Attention",
    ),
    "norms and activations": (nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Softmax(-1)), [(2, 4, 3, 3)], None),
}


@pytest.mark.parametrize("name", MODULES)
def test_counts_what_pytorch_counts(name: str) -> None:
    module, shapes, op_type = MODULES[name]
    inputs = [torch.zeros(shape) for shape in shapes]
    expected = reference(module, *inputs)
    flops = count_flops(export(module, *inputs), {})
    assert flops.total == expected
    assert {op for op, count in flops.by_op_type.items() if count} == ({op_type} if op_type else set())


def test_unet() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    inputs = (torch.zeros(2, 4, 16, 16), torch.ones(2), torch.zeros(2, 7, 32))
    flops = count_flops(export(unet, *inputs), {})
    assert flops.total == reference(unet, *inputs)
    assert all(flops.by_op_type[op] for op in ("Conv", "MatMul", "Gemm", "Attention"))


def test_transformer_of_any_size(tmp_path: Path) -> None:
    """Its reshape targets are computed in the graph, and its weights are not there to be read."""
    from diffusers import Transformer2DModel

    module = Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=32, norm_num_groups=8, cross_attention_dim=16
    )
    batch, h, w = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "h", "w"))
    graph = export(
        module,
        torch.zeros(2, 32, 8, 12),
        torch.zeros(2, 7, 16),
        dynamic_shapes={"hidden_states": {0: batch, 2: 4 * h, 3: 4 * w}, "encoder_hidden_states": {0: batch}},
    )
    assert any(node.op_type == "Shape" for node in graph)
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "transformer.onnx", external_data="transformer.onnx.data")
    (tmp_path / "transformer.onnx.data").unlink()
    graph = ir.load(tmp_path / "transformer.onnx").graph
    for dims in ({"batch": 1, "h": 2, "w": 3}, {"batch": 3, "h": 4, "w": 2}):
        inputs = torch.zeros(dims["batch"], 32, 4 * dims["h"], 4 * dims["w"]), torch.zeros(dims["batch"], 7, 16)
        assert count_flops(graph, dims).total == reference(module, *inputs)


def test_graph_size_counts_floating_point_initializers() -> None:
    graph = text("float[2,6] x", "z = Relu(x) y = Relu(z)")
    arrays = {"w": np.zeros((6, 4), np.float32), "h": np.zeros((3, 5), np.float16), "axes": np.zeros(7, np.int64)}
    for name, array in arrays.items():
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    assert graph_size(graph) == GraphSize(nodes=2, parameters=24 + 15, parameter_bytes=24 * 4 + 15 * 2)


PRODUCTS = {
    "1d by 1d": ("float[5] a, float[5] b", "y = MatMul(a, b)", lambda a, b: a[None] @ b[:, None]),
    "1d by 3d": ("float[5] a, float[3,5,4] b", "y = MatMul(a, b)", lambda a, b: a.expand(3, 1, 5) @ b),
    "3d by 1d": ("float[3,4,5] a, float[5] b", "y = MatMul(a, b)", lambda a, b: a @ b[:, None]),
    "left transposed": ("float[5,4] a, float[5,6] b", "y = Gemm <transA=1> (a, b)", lambda a, b: a.T @ b),
    "right transposed": ("float[4,5] a, float[6,5] b", "y = Gemm <transB=1> (a, b)", lambda a, b: a @ b.T),
    "both transposed": ("float[5,4] a, float[6,5] b", "y = Gemm <transA=1, transB=1> (a, b)", lambda a, b: a.T @ b.T),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_vectors_and_transposed_operands(name: str) -> None:
    inputs, body, function = PRODUCTS[name]
    graph = text(inputs, body)
    operands = [torch.zeros(value.shape.numpy()) for value in graph.inputs]
    assert count_flops(graph, {}).total == reference(function, *operands)


@pytest.mark.parametrize(("heads", "kv_heads", "value_size"), [(4, 4, 3), (4, 2, 3), (6, 2, 5)])
def test_attention_of_three_dimensions(heads: int, kv_heads: int, value_size: int) -> None:
    graph = text(
        f"float[2,7,{heads * 3}] q, float[2,5,{kv_heads * 3}] k, float[2,5,{kv_heads * value_size}] v",
        f"y = Attention <q_num_heads={heads}, kv_num_heads={kv_heads}> (q, k, v)",
    )
    operands = [
        torch.zeros(2, count, length, size)
        for count, length, size in ((heads, 7, 3), (kv_heads, 5, 3), (kv_heads, 5, value_size))
    ]
    assert count_flops(graph, {}).total == reference(lambda q, k, v: attend(q, k, v, enable_gqa=True), *operands)


def test_attention_with_a_past() -> None:
    graph = text(
        "float[2,4,7,3] q, float[2,4,5,3] k, float[2,4,5,3] v, float[2,4,6,3] pk, float[2,4,6,3] pv",
        "y, present_k, present_v = Attention(q, k, v, , pk, pv)",
    )
    expected = reference(attend, torch.zeros(2, 4, 7, 3), torch.zeros(2, 4, 11, 3), torch.zeros(2, 4, 11, 3))
    assert count_flops(graph, {}).total == expected


def test_attention_of_three_dimensions_needs_heads() -> None:
    with pytest.raises(FlopCountError, match="q_num_heads"):
        count_flops(text("float[2,7,12] q, float[2,5,12] k, float[2,5,12] v", "y = Attention(q, k, v)"), {})


def test_dimensions_are_bound_by_name_and_expression() -> None:
    graph = text(
        'float[rows,4,"height/8","2*w"] x, float[8,4,3,3] w, float[batch,5,rows] other',
        "z = Conv <pads=[1,1,1,1]> (x, w) n = GroupNormalization <num_groups=2> (z, s, s) y = Relu(n)",
    )
    flops = count_flops(graph, {"rows": 2, "batch": 1, "height": 64, "w": 3, "unused": 9})
    assert flops.total == 2 * 2 * (8 * 6) * (8 * 4 * 9)
    assert count_flops(graph, {"rows": 2, "batch": 1, "height/8": 8, "2*w": 6}) == flops


def test_outdated_shapes_are_not_used() -> None:
    graph = text("float[rows,4] x, float[4,5] w", "z = Relu(x) y = MatMul(z, w)")
    for node in graph:
        node.outputs[0].shape = ir.Shape([7, "somewhere", 99])
    assert count_flops(graph, {"rows": 3}).total == 2 * 3 * 4 * 5
    assert graph[0].outputs[0].shape == ir.Shape([7, "somewhere", 99])


SIZES = """
    shape = Shape(x)  last = Constant <value_ints=[-1]> ()  zero = Constant <value_int=0> ()
    two = Constant <value_int=2> ()  axis = Constant <value_ints=[0]> ()  three = Constant <value_ints=[3]> ()
    rows = Gather(shape, zero)  side = Shape <start=-1> (x)  scalar = Squeeze(side, axis)
    half = Div(scalar, two)  even = Mul(half, two)  odd = Sub(scalar, even)  up = Add(half, odd)
    half_side = Unsqueeze(up, axis)  floating = Cast <to=1> (half_side)  integer = Cast <to=7> (floating)
    batch = Unsqueeze(rows, axis)  same = Identity(batch)
    sizes = Concat <axis=0> (same, integer, last, axis)  first = Slice(sizes, axis, three)
    target = Reshape(first, last)
"""


def test_sizes_are_computed_as_the_graph_computes_them() -> None:
    graph = text("float[rows,12,side] x, float[k,4] w", SIZES + "z = Reshape(x, target) y = MatMul(z, w)")
    dims = {"rows": 2, "side": 7, "k": 21}
    shapes = {value.name: shape for value, shape in infer_shapes(graph, dims).items()}
    assert shapes["z"] == ir.Shape([2, 7 // 2 + 7 % 2, 21])
    assert count_flops(graph, dims).total == 2 * (2 * 4 * 21) * 4


def test_long_lists_of_lengths_are_constants() -> None:
    """ShapeInferencePass drops initializers of more than 1000 bytes; SDXL's packed projections have longer lists."""
    graph = text("float[300,3] x", "y = Relu(x)")
    lengths = ir.Value(name="lengths", const_value=ir.tensor(np.arange(200) % 2 + 1, name="lengths"))
    graph.register_initializer(lengths)
    graph.append(ir.node("Split", [graph.inputs[0], lengths], {"axis": 0}, num_outputs=200))
    for number, output in enumerate(graph[-1].outputs):
        output.name = f"part_{number}"
    shapes = infer_shapes(graph, {})
    assert [shapes[output] for output in graph[-1].outputs[:2]] == [ir.Shape([1, 3]), ir.Shape([2, 3])]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("z = NonZero(x) f = Cast <to=1> (z) y = MatMul(w, f)", r"NonZero '.*' depends on data"),
        ("z = NonZero(x) f = Cast <to=1> (z) t = Transpose(f) y = MatMul(t, v)", r"'y'.*\(\?, 3\).*NonZero"),
        ("y = MatMul(x, x)", "do not fit"),
        ("z = Mystery(x) y = MatMul(z, x)", "Mystery"),
        ('y = Einsum <equation="ab,bc->ac"> (x, w)', "Einsum '.*' multiplies matrices but has no rule"),
        ("y = com.microsoft.FusedMatMul(x, w)", "com.microsoft"),
    ],
    ids=["data", "data beyond", "mismatch", "unknown operator", "einsum", "other domain"],
)
def test_what_cannot_be_counted_is_refused(body: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    graph = text("float[2,4] x, float[4,3] w, float[2,3] v", body)
    with caplog.at_level(logging.WARNING), pytest.raises(FlopCountError, match=message) as caught:
        count_flops(graph, {})
    assert caught.value.node in tuple(graph)
    assert not caplog.records


def test_a_graph_in_a_node_is_refused() -> None:
    graph = text(
        "bool c, float[2,2] x",
        "y = If (c) <then_branch = a () => (float[2,2] p) { p = MatMul(x, x) },"
        " else_branch = b () => (float[2,2] q) { q = Relu(x) }>",
    )
    with pytest.raises(FlopCountError, match="how often"):
        count_flops(graph, {})


def test_an_unbound_dimension_is_refused() -> None:
    graph = text("float[rows,4] x, float[4,5] w", "y = MatMul(x, w)")
    with pytest.raises(FlopCountError, match=r"'x' is \(rows, 4\), and 'rows' does not follow from batch=1"):
        count_flops(graph, {"batch": 1})
    uneven = text('float["height/8",4] x, float[4,5] w', "y = MatMul(x, w)")
    with pytest.raises(FlopCountError, match="height=20"):
        count_flops(uneven, {"height": 20})


def test_an_input_without_a_shape_is_refused() -> None:
    with pytest.raises(FlopCountError, match="input 'x' of the graph does not say its shape"):
        count_flops(text("float[?,4] x, float[4,5] w", "z = Relu(x) y = MatMul(z, w)"), {})


def test_an_old_opset_is_refused() -> None:
    with pytest.raises(FlopCountError, match="opset 11"):
        count_flops(text("float[2,4] x", "y = Relu(x)", opset=11), {})
