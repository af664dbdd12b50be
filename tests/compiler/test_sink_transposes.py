"""Graphs before and after Transposes sink through them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import contents, feed, graph_of, operators, run, session

from controlrt.compiler.passes.sink_transposes import SinkTransposes

FIRST, LAST = "Transpose <perm = [0, 3, 1, 2]>", "Transpose <perm = [0, 2, 3, 1]>"
X = "float[rows, 4, 6, 8] x"
RNG = np.random.default_rng(0)


def between(body: str, inputs: str = X, shape: str = "rows, 4, 6, 8", **constants: Any) -> ir.Model:
    """``body`` makes t of a, a picture whose channels were last."""
    outputs = f"float[{shape}] z"
    return graph_of(f"{inputs}", outputs, f"a = {FIRST} (x) {body} z = {LAST} (t)", **constants)


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "nothing": ("t = Identity (a)", {}, 0),
    "a chain": ("b = Sigmoid (a) c = Mul (a, b) t = Neg (c)", {}, 0),
    "a scalar": ("t = Mul (a, s)", {"s": 3.0}, 0),
    "a constant picture": ("t = Add (a, c)", {"c": RNG.normal(0, 1, (1, 8, 4, 6))}, 0),
    "one value for each channel": ("t = Mul (a, c)", {"c": RNG.normal(0, 1, (1, 8, 1, 1))}, 0),
    "a picture with channels first": (
        "t = Add (a, p)",
        {"inputs": f"{X}, float[rows, 8, 4, 6] p"},
        1,
    ),
    "one channel": ("t = Mul (a, p)", {"inputs": f"{X}, float[rows, 1, 4, 6] p"}, 0),
    "one pixel": ("t = Mul (p, a)", {"inputs": f"{X}, float[rows, 8, 1, 1] p"}, 0),
    "joined on channels": ("b = Neg (a) t = Concat <axis = 1> (a, b)", {"shape": "rows, 4, 6, 16"}, 0),
    "joined on a side": ("b = Neg (a) t = Concat <axis = -1> (a, b)", {"shape": "rows, 4, 12, 8"}, 0),
    "chosen pictures": (
        "t = Gather <axis = 0> (a, i)",
        {"inputs": f"{X}, int64[k] i", "shape": "k, 4, 6, 8"},
        0,
    ),
    "upsampled": (
        't = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (a,, s)',
        {"s": np.array([1, 1, 2, 3], np.float32), "shape": "rows, 8, 18, 8"},
        0,
    ),
    "interleaved": ("t = DepthToSpace <blocksize = 2> (a)", {"shape": "rows, 8, 12, 2"}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_same_result_without_transposes(case: str) -> None:
    body, options, left = CASES[case]
    before, after = (between(body, **options) for _ in range(2))
    assert SinkTransposes()(after).modified
    swaps = [
        node for node in after.graph if tuple(node.attributes.get_ints("perm", ())) in ((0, 3, 1, 2), (0, 2, 3, 1))
    ]
    assert len(swaps) == left
    first, second = session(before), session(after)
    for rows in (1, 3):
        rng = np.random.default_rng(rows)
        values: dict[str, Any] = {
            value.name or "": rng.normal(0, 1, [d if isinstance(d, int) else rows for d in value.shape or ()]).astype(
                np.float32
            )
            for value in before.graph.inputs
        }
        values["i"] = np.array([rows - 1, 0, 0])
        np.testing.assert_array_equal(feed(second, values)["z"], feed(first, values)["z"])


def test_only_where_something_below_wants_it() -> None:
    """The sampler's arithmetic keeps its channels first."""
    body = f"a = {FIRST} (x) b = Mul (a, p) z = Neg (b)"
    model = graph_of(f"{X}, float[rows, 8, 4, 6] p", "float[rows, 8, 4, 6] z", body)
    before = contents(model)
    assert not SinkTransposes()(model).modified
    assert contents(model) == before


def test_what_two_read() -> None:
    body = f"a = {FIRST} (x) b = Neg (a) y = {LAST} (b) z = Reshape (b, s)"
    before, after = (
        graph_of(X, "float[rows, 4, 6, 8] y, float[rows, 192] z", body, s=np.array([0, -1])) for _ in range(2)
    )
    assert SinkTransposes()(after).modified
    assert operators(after).count("Transpose") == 1
    x = RNG.normal(0, 1, (2, 4, 6, 8)).astype(np.float32)
    expected, found = run(before, x=x), run(after, x=x)
    np.testing.assert_array_equal(found["y"], expected["y"])
    np.testing.assert_array_equal(found["z"], expected["z"])


NEAR_MISSES = {
    "another order of axes": f"a = Transpose <perm = [0, 3, 2, 1]> (x) b = Neg (a) z = {LAST} (b)",
    "an operator that mixes channels": f"a = {FIRST} (x) b = Softmax <axis = 1> (a) z = {LAST} (b)",
    "an operator that nobody knows": f"a = {FIRST} (x) b = local.Neg (a) z = {LAST} (b)",
    "nothing to cancel with": f"a = Neg (x) z = {LAST} (a)",
}


@pytest.mark.parametrize("body", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses(body: str) -> None:
    model = graph_of(X, "float[rows, p, q, r] z", body, infer="local" not in body)
    before = contents(model)
    assert not SinkTransposes()(model).modified
    assert contents(model) == before


@pytest.mark.parametrize("case", CASES)
def test_idempotent(case: str) -> None:
    body, options, _ = CASES[case]
    model = between(body, **options)
    SinkTransposes()(model)
    before = contents(model)
    assert not SinkTransposes()(model).modified
    assert contents(model) == before
