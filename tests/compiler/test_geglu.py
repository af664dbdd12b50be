"""The split projection against ONNX Runtime on the graph as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.passes.geglu import Geglu

CHANNELS, WIDTH = 6, 10
"""Channels of x, and of each half."""
HALVES = "v, g = Split <axis = 2, num_outputs = 2> (h)"
GATE = "a = Gelu (g) y = Mul (v, a)"


def projection(
    body: str,
    dtype: str = "float",
    outputs: str = "{dtype}[rows, tokens, n] y",
    inputs: str = "{dtype}[rows, tokens, 6] x",
    width: int = 2 * WIDTH,
    seed: int = 0,
) -> ir.Model:
    """A graph of ``body`` over x, the weights W and b, and the integers ``sizes`` and ``uneven`` for Split."""
    rng = np.random.default_rng(seed)
    numpy_dtype = {"float": np.float32, "float16": np.float16}[dtype]
    constants = {
        "W": rng.standard_normal((CHANNELS, width)).astype(numpy_dtype),
        "b": rng.standard_normal(width).astype(numpy_dtype),
        "b_row": rng.standard_normal((1, width)).astype(numpy_dtype),
        "sizes": np.array([WIDTH, WIDTH]),
        "uneven": np.array([WIDTH - 2, WIDTH + 2]),
    }
    named = {name: value for name, value in constants.items() if re.search(rf"\b{name}\b", body)}
    declared = ", ".join(
        f"{'int64' if value.dtype == np.int64 else dtype}[{','.join(map(str, value.shape))}] {name}"
        for name, value in named.items()
    )
    signature = f"({inputs}) => ({outputs})".replace("{dtype}", dtype)
    text = f'<ir_version: 10, opset_import: ["": 23]> agraph {signature} <{declared}> {{ {body} }}'
    model = ir.from_onnx_text(text, [ir.tensor(value, name=name) for name, value in named.items()])
    ir.passes.common.ShapeInferencePass()(model)
    return model


def run(model: ir.Model, directory: Path, **inputs: Any) -> list[Any]:
    ir.save(model, directory / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def contents(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


FIRES = {
    "bias": f"p = MatMul (x, W) h = Add (p, b) {HALVES} {GATE}",
    "bias first": f"p = MatMul (x, W) h = Add (b, p) {HALVES} {GATE}",
    "no bias": f"h = MatMul (x, W) {HALVES} {GATE}",
    "sizes": f"p = MatMul (x, W) h = Add (p, b) v, g = Split <axis = -1> (h, sizes) {GATE}",
    "not a gate": f"p = MatMul (x, W) h = Add (p, b) {HALVES} y = Add (v, g)",
    "one half unused": f"p = MatMul (x, W) h = Add (p, b) {HALVES} y = Relu (g)",
}


@pytest.mark.parametrize("body", FIRES.values(), ids=FIRES)
def test_same_result(body: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((rows, tokens, CHANNELS), np.float32) for rows, tokens in ((1, 1), (2, 7), (3, 64))]
    before = [run(projection(body), tmp_path, x=x) for x in inputs]
    model = projection(body)
    assert Geglu()(model).modified
    assert "Split" not in operators(model)
    assert operators(model).count("MatMul") == 2
    for x, (expected,) in zip(inputs, before, strict=True):
        (found,) = run(model, tmp_path, x=x)
        # Six products and a bias may be summed in another order, each sum rounded to 2^-24.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_half_precision(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((2, 7, CHANNELS)).astype(np.float16)
    (expected,) = run(projection(FIRES["bias"], "float16"), tmp_path, x=x)
    model = projection(FIRES["bias"], "float16")
    assert Geglu()(model).modified
    assert {v.dtype for v in model.graph.initializers.values() if "half" in str(v.name)} == {ir.DataType.FLOAT16}
    (found,) = run(model, tmp_path, x=x)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-10 * np.abs(expected).max())


def test_what_is_recorded() -> None:
    model = projection(FIRES["bias"])
    Geglu()(model)
    RemoveUnusedNodesPass()(model)
    for node in model.graph:
        assert node.outputs[0].dtype == ir.DataType.FLOAT, node
        if node.op_type in ("MatMul", "Add"):
            assert node.outputs[0].shape == ir.Shape(["rows", "tokens", WIDTH]), node
    assert {name: value.shape for name, value in model.graph.initializers.items()} == {
        "W.half_0": [CHANNELS, WIDTH],
        "W.half_1": [CHANNELS, WIDTH],
        "b.half_0": [WIDTH],
        "b.half_1": [WIDTH],
    }


def test_halves_that_the_graph_gives_keep_their_names(tmp_path: Path) -> None:
    body = f"p = MatMul (x, W) h = Add (p, b) {HALVES}"
    outputs = "{dtype}[rows, tokens, 10] v, {dtype}[rows, tokens, 10] g"
    x = np.random.default_rng(1).standard_normal((2, 3, CHANNELS), np.float32)
    expected = run(projection(body, outputs=outputs), tmp_path, x=x)
    model = projection(body, outputs=outputs)
    assert Geglu()(model).modified
    assert [value.name for value in model.graph.outputs] == ["v", "g"]
    np.testing.assert_allclose(run(model, tmp_path, x=x), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_weights_are_not_read_before_the_model_is_written() -> None:
    model = projection(FIRES["no bias"])
    reads = []
    weight = model.graph.initializers["W"]
    tensor = weight.const_value
    assert tensor is not None

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return tensor

    weight.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape([CHANNELS, 2 * WIDTH]), name="W")
    assert Geglu()(model).modified
    assert not reads
    half = model.graph.initializers["W.half_1"].const_value
    assert half is not None
    np.testing.assert_array_equal(half.numpy(), tensor.numpy()[:, WIDTH:])


def test_a_shared_weight_is_cut_once(tmp_path: Path) -> None:
    body = f"h = MatMul (x, W) {HALVES} k = MatMul (z, W) s, t = Split <axis = 2, num_outputs = 2> (k) q = Mul (v, s) "
    body += "r = Mul (g, t) y = Add (q, r)"
    inputs = "{dtype}[rows, tokens, 6] x, {dtype}[rows, tokens, 6] z"
    x, z = np.random.default_rng(1).standard_normal((2, 2, 3, CHANNELS), np.float32)
    (expected,) = run(projection(body, inputs=inputs), tmp_path, x=x, z=z)
    model = projection(body, inputs=inputs)
    Geglu()(model)
    assert operators(model).count("MatMul") == 4
    RemoveUnusedNodesPass()(model)
    assert sorted(model.graph.initializers) == ["W.half_0", "W.half_1"]
    (found,) = run(model, tmp_path, x=x, z=z)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "uneven": {"body": "h = MatMul (x, W) v, g = Split <axis = 2> (h, uneven) a = ReduceSum (v) y = Add (g, a)"},
    "odd": {
        "body": f"h = MatMul (x, W) {HALVES} a = ReduceSum (g) y = Mul (v, a)",
        "width": 2 * WIDTH + 1,
    },
    "other axis": {"body": f"h = MatMul (x, W) v, g = Split <axis = 1, num_outputs = 2> (h) {GATE}"},
    "first axis, by default": {"body": f"h = MatMul (x, W) v, g = Split <num_outputs = 2> (h) {GATE}"},
    "three parts": {
        "body": "h = MatMul (x, W) v, g, t = Split <axis = 2, num_outputs = 3> (h) y = Mul (v, g)",
        "width": 3 * WIDTH,
    },
    "sum read elsewhere": {
        "body": f"p = MatMul (x, W) h = Add (p, b) {HALVES} a = Mul (v, g) s = ReduceSum (h) y = Add (a, s)"
    },
    "product read elsewhere": {
        "body": f"p = MatMul (x, W) h = Add (p, b) {HALVES} a = Mul (v, g) s = ReduceSum (p) y = Add (a, s)"
    },
    "whole is an output": {
        "body": f"p = MatMul (x, W) h = Add (p, b) {HALVES} {GATE}",
        "outputs": "{dtype}[rows, tokens, 10] y, {dtype}[rows, tokens, 20] h",
    },
    "computed weight": {"body": f"w = Abs (W) h = MatMul (x, w) {HALVES} {GATE}"},
    "fed weight": {
        "body": f"h = MatMul (x, w) {HALVES} {GATE}",
        "inputs": "{dtype}[rows, tokens, 6] x, {dtype}[6, 20] w",
    },
    "computed bias": {"body": f"p = MatMul (x, W) c = Abs (b) h = Add (p, c) {HALVES} {GATE}"},
    "bias of another shape": {"body": f"p = MatMul (x, W) h = Add (p, b_row) {HALVES} {GATE}"},
    "constant on the left": {
        "body": f"t = MatMul (W, x) {HALVES.replace('h', 't')} {GATE}",
        "inputs": "{dtype}[rows, 20, n] x",
    },
    "subtraction": {"body": f"p = MatMul (x, W) h = Sub (p, b) {HALVES} {GATE}"},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = projection(**case)
    before = contents(model)
    assert not Geglu()(model).modified
    assert contents(model) == before


def test_second_time() -> None:
    model = projection(FIRES["bias"])
    Geglu()(model)
    before = contents(model)
    assert not Geglu()(model).modified
    assert contents(model) == before


def test_diffusers_feed_forward(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from diffusers.models.attention import FeedForward

    torch.manual_seed(0)
    module = FeedForward(16, activation_fn="geglu").eval()
    x = torch.randn(3, 5, 16)
    dynamic = ({0: torch.export.Dim("rows", min=1, max=8)},)
    program = torch.onnx.export(module, (x,), dynamo=True, opset_version=23, dynamic_shapes=dynamic, verbose=False)
    assert Geglu()(program.model).modified
    assert "Split" not in operators(program.model)
    x = torch.randn(2, 5, 16)
    (found,) = run(program.model, tmp_path, **{program.model.graph.inputs[0].name: x.numpy()})
    expected = module(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
