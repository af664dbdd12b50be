"""Reshapes freed from the size of axis 0: the same data, and the same node for any number of rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes


def model_of(
    shape: list[Any], body: str, recorded: list[Any] | None = None, inputs: str = "", **constants: list[int]
) -> ir.Model:
    """A graph of ``body`` that makes r from x and the constants; ``recorded`` is the shape of r."""
    text = f"""<ir_version: 10, opset_import: ["": 23]> agraph
        (float[{",".join("n" for _ in shape)}] x{inputs}) => (float y) {{ {body} y = Neg (r) }}"""
    model = ir.from_onnx_text(text)
    model.graph.inputs[0].shape = ir.Shape(shape)
    for node in list(model.graph):
        for value in node.inputs:
            if value is not None and value.name in constants and value.const_value is None:
                value.const_value = ir.tensor(np.array(constants[value.name], np.int64), name=value.name)
                value.shape, value.dtype = ir.Shape([len(constants[value.name])]), ir.DataType.INT64
                model.graph.register_initializer(value)
        for value in node.outputs:
            if node.op_type in ("Shape", "Mul", "Unsqueeze"):
                start, end = (node.attributes.get_int(name, 0) for name in ("start", "end"))
                value.shape = ir.Shape([end - start if end else 1])
            value.dtype = ir.DataType.INT64 if node.op_type in ("Shape", "Mul", "Concat") else ir.DataType.FLOAT
            if value.name == "r" and recorded is not None:
                value.shape = ir.Shape(recorded)
    return model


def reshape(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "Reshape")


def target(model: ir.Model) -> list[int] | None:
    value = reshape(model).inputs[1]
    assert value is not None
    return None if value.const_value is None else list(value.const_value.numpy().tolist())


def run(model: ir.Model, directory: Path, **inputs: Any) -> Any:
    ir.save(model, directory / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def contents(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


PLAIN = "r = Reshape <allowzero = 1> (x, t)"
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "heads": (
        {"shape": ["rows", 12, 8], "body": PLAIN, "t": [-1, 12, 2, 4], "recorded": ["rows", 12, 2, 4]},
        [0, 0, 2, 4],
    ),
    "sides joined": ({"shape": ["rows", 3, 4, 8], "body": PLAIN, "t": [-1, 12, 8]}, [0, 12, 8]),
    "all joined": ({"shape": ["rows", 3, 4, 8], "body": PLAIN, "t": [-1, 96]}, [0, 96]),
    "vector": ({"shape": ["rows"], "body": PLAIN, "t": [-1]}, [0]),
    "unit sides": ({"shape": ["rows"], "body": PLAIN, "t": [-1, 1, 1, 1]}, [0, 1, 1, 1]),
    "number of rows": ({"shape": [3, 3, 4, 8], "body": PLAIN, "t": [3, 12, 8]}, [0, 12, 8]),
    "number of rows for any": ({"shape": ["rows", 3, 4, 8], "body": PLAIN, "t": [3, 12, 8]}, [0, 12, 8]),
    "one unknown": (
        {"shape": ["rows", 12, "n"], "body": PLAIN.replace("1", "0"), "t": [0, 3, 4, -1], "recorded": None},
        [0, 3, 4, -1],
    ),
    "computed": (
        {
            "shape": ["rows", 3, 4, 8],
            "body": f"n = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (n, rest) {PLAIN}",
            "rest": [12, 8],
            "recorded": ["rows", 12, 8],
        },
        [0, 12, 8],
    ),
    "computed whole": (
        {"shape": ["rows", "n", 8], "body": f"t = Shape (x) {PLAIN}", "recorded": ["rows", "n", 8]},
        [0, 0, 0],
    ),
    "sides of any size joined": (
        {
            "shape": ["rows", 3, "n", 8],
            "body": "n = Shape <start = 0, end = 1> (x) w = Shape <start = 2, end = 3> (x) m = Mul (w, three) "
            f"t = Concat <axis = 0> (n, m, rest) {PLAIN}",
            "three": [3],
            "rest": [8],
            "recorded": ["rows", "3*n", 8],
        },
        [0, -1, 8],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_result(case: str, tmp_path: Path) -> None:
    arguments, expected_target = CASES[case]
    model = model_of(**arguments)
    sizes = [size if isinstance(size, int) else {"rows": 3, "n": 4}[size] for size in arguments["shape"]]
    x = np.random.default_rng(0).standard_normal(sizes, np.float32)
    expected = run(model, tmp_path, x=x)
    assert RowAgnosticReshapes()(model).modified == (case != "one unknown")
    assert target(model) == expected_target
    assert reshape(model).attributes.get_int("allowzero", 0) == 0
    np.testing.assert_array_equal(run(model, tmp_path, x=x), expected)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_number_of_rows(rows: int, tmp_path: Path) -> None:
    """The graph before fits no other number of rows than its target says; after, every number."""
    model = model_of(["rows", 3, 4], PLAIN, t=[4, 12])
    RowAgnosticReshapes()(model)
    x = np.random.default_rng(0).standard_normal((rows, 3, 4), np.float32)
    np.testing.assert_array_equal(run(model, tmp_path, x=x), -x.reshape(rows, 12))


BOTH_SIDES = """
    n = Shape <start = 0, end = 1> (x) h = Shape <start = 1, end = 2> (z) w = Shape <start = 2, end = 3> (z)
    t = Concat <axis = 0> (n, h, w, rest) r = Reshape <allowzero = 1> (x, t)"""
WITH_SIDES = ", float[any, h, w] z"


def test_two_unknown_sides(tmp_path: Path) -> None:
    model = model_of(["rows", "h*w", 8], BOTH_SIDES, ["rows", "h", "w", 8], inputs=WITH_SIDES, rest=[8])
    assert RowAgnosticReshapes()(model).modified
    concat = reshape(model).inputs[1].producer()
    assert [value.const_value.numpy().tolist() if value.const_value else value.name for value in concat.inputs] == [
        [0],
        "h",
        "w",
        [8],
    ]
    assert concat.outputs[0].dtype == ir.DataType.INT64
    RemoveUnusedNodesPass()(model)
    assert [node.op_type for node in model.graph] == ["Shape", "Shape", "Concat", "Reshape", "Neg"]
    assert not RowAgnosticReshapes()(model).modified
    for rows, height, width in ((1, 2, 3), (4, 5, 1)):
        x = np.random.default_rng(0).standard_normal((rows, height * width, 8), np.float32)
        found = run(model, tmp_path, x=x, z=np.zeros((7, height, width), np.float32))
        np.testing.assert_array_equal(found, -x.reshape(rows, height, width, 8))


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "rows and heads joined": {
        "shape": ["rows", 2, 12, 4],
        "body": PLAIN,
        "t": [-1, 12, 4],
        "recorded": ["2*rows", 12, 4],
    },
    "rows and heads apart": {"shape": ["n", 12, 4], "body": PLAIN, "t": [-1, 2, 12, 4], "recorded": ["n//2", 2, 12, 4]},
    "rows moved": {"shape": ["rows", 12], "body": PLAIN, "t": [1, -1, 12], "recorded": [1, "rows", 12]},
    "rows of one picture": {"shape": [1, 12], "body": PLAIN, "t": [3, 4]},
    "names unknown": {"shape": [None, None, 8], "body": PLAIN, "t": [-1, 6, 4], "recorded": [None, 6, 4]},
    "nothing recorded": {"shape": ["rows", "n"], "body": PLAIN, "t": [-1, 4]},
    "computed, nothing recorded": {
        "shape": ["rows", 3, 4],
        "body": f"n = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (n, rest) {PLAIN}",
        "rest": [12],
    },
    "fed target": {"shape": ["rows", 3, 4], "body": PLAIN, "inputs": ", int64[2] t", "recorded": ["rows", 12]},
    "scalar": {"shape": [], "body": PLAIN, "t": [-1], "recorded": [1]},
    "to a scalar": {"shape": [1], "body": PLAIN, "t": [], "recorded": []},
    "empty": {"shape": ["rows", 0, 4], "body": PLAIN, "t": [5, 0], "recorded": ["rows", 0]},
    "empty, 0 meaning 0": {"shape": ["rows", 3, 4], "body": PLAIN, "t": [0, 12], "recorded": ["rows", 12]},
    "two sides, one part for both": {
        "shape": ["rows", "h*w", 8],
        "body": f"t = Shape (z) {PLAIN}",
        "inputs": ", float[rows, h, w, 8] z",
        "recorded": ["rows", "h", "w", 8],
    },
    "two sides, parts joined": {
        "shape": ["rows", "h*w", 8],
        "body": f"a = Shape <start = 0, end = 2> (z) t = Concat <axis = 0> (a, rest) {PLAIN}",
        "inputs": ", float[rows, h, 5] z",
        "rest": [-1, 8],
        "recorded": ["rows", "h", "w", 8],
    },
    "two sides, one counted in rows": {
        "shape": ["rows", "rows*h", 8],
        "body": BOTH_SIDES,
        "inputs": WITH_SIDES,
        "rest": [8],
        "recorded": ["rows", "rows", "h", 8],
    },
    "two sides, 0 meaning 0": {
        "shape": ["rows", "h*w", 8],
        "body": BOTH_SIDES,
        "inputs": WITH_SIDES,
        "rest": [0],
        "recorded": ["rows", "h", "w", "nothing"],
    },
    "already": {"shape": ["rows", 12], "body": PLAIN.replace("1", "0"), "t": [0, 3, 4], "recorded": ["rows", 3, 4]},
}


@pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(case: dict[str, Any]) -> None:
    model = model_of(**case)
    before = contents(model)
    assert not RowAgnosticReshapes()(model).modified
    assert contents(model) == before


def test_what_is_recorded() -> None:
    model = model_of(["rows", 3, 4], PLAIN, [None, 12], t=[-1, 12])
    RowAgnosticReshapes()(model)
    assert reshape(model).outputs[0].shape == ir.Shape(["rows", 12])
    value = reshape(model).inputs[1]
    assert value is not None
    assert (value.dtype, value.shape, value.is_initializer()) == (ir.DataType.INT64, ir.Shape([2]), True)
    RemoveUnusedNodesPass()(model)
    assert list(model.graph.initializers) == ["ints_0_12"]


def test_equal_targets_are_one_initializer() -> None:
    model = model_of(["rows", 3, 4], "q = Reshape (x, t) p = Neg (q) s = Reshape (x, u) r = Add (p, s)", t=[-1, 12])
    second = next(node for node in model.graph if node.outputs[0].name == "s").inputs[1]
    assert second is not None
    second.const_value = ir.tensor(np.array([-1, 12]), name="u")
    model.graph.register_initializer(second)
    RowAgnosticReshapes()(model)
    RemoveUnusedNodesPass()(model)
    assert len(model.graph.initializers) == 1


@pytest.mark.parametrize("case", CASES)
def test_second_time(case: str) -> None:
    model = model_of(**CASES[case][0])
    RowAgnosticReshapes()(model)
    before = contents(model)
    assert not RowAgnosticReshapes()(model).modified
    assert contents(model) == before


sizes = st.lists(st.integers(1, 4), max_size=4)


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 4), before=sizes, after=sizes, leading=st.sampled_from(["-1", "number", "0"]))
def test_any_target(rows: int, before: list[int], after: list[int], leading: str) -> None:
    """It fires where numpy keeps axis 0 for every number of rows, and then means the same."""
    given_target = [{"-1": -1, "number": rows, "0": 0}[leading], *after]
    model = model_of(["rows", *before], PLAIN, t=given_target)
    keeps = math.prod(before) == math.prod(after)
    assert RowAgnosticReshapes()(model).modified == (keeps and leading != "0")
    if keeps and leading != "0":
        x = np.arange(rows * math.prod(before)).reshape(rows, *before)
        found = [x.shape[axis] if size == 0 else size for axis, size in enumerate(target(model) or [])]
        np.testing.assert_array_equal(x.reshape(found), x.reshape(given_target))


def test_diffusers_attention(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    torch.manual_seed(0)
    module = Transformer2DModel(2, 4, 8, cross_attention_dim=6, norm_num_groups=4).eval()
    rows, height, width = (torch.export.Dim(name, min=1, max=8) for name in ("rows", "h", "w"))
    dynamic: dict[str, Any] = {"hidden_states": {0: rows, 2: height, 3: width}, "encoder_hidden_states": {0: rows}}
    example = {"hidden_states": torch.randn(3, 8, 4, 5), "encoder_hidden_states": torch.randn(3, 7, 6)}
    program = torch.onnx.export(
        module,
        kwargs={**example, "return_dict": False},
        dynamo=True,
        opset_version=23,
        dynamic_shapes={**dynamic, "return_dict": None},
        verbose=False,
    )
    assert RowAgnosticReshapes()(program.model).modified
    RemoveUnusedNodesPass()(program.model)
    for node in program.model.graph:
        if node.op_type == "Reshape" and len(node.inputs[0].shape):
            leading = node.inputs[1] if node.inputs[1].const_value else node.inputs[1].producer().inputs[0]
            assert leading.const_value.numpy()[0] == 0
    for size in ((1, 8, 2, 3), (2, 8, 8, 4)):
        x, c = torch.randn(size), torch.randn(size[0], 7, 6)
        found = run(program.model, tmp_path, hidden_states=x.numpy(), encoder_hidden_states=c.numpy())
        expected = module(x, c, return_dict=False)[0].detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
