"""One file of weights: what is in it, where, and that ONNX Runtime reads it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from compiler.graphs import contents, graph_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from controlrt.compiler.weights import INLINE, LINE, PAGE, WeightStore

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((32, 48), np.float32)
"""6144 bytes: more than a page."""
MIDDLE = RNG.standard_normal((32, 16), np.float32)
"""2048 bytes: less than a page, too much to stay inline."""
SMALL = RNG.standard_normal(48, np.float32)


def product(**constants: NDArray[Any]) -> ir.Model:
    """x times every two-dimensional constant, plus every other one."""
    body, value = "", "x"
    for number, (name, constant) in enumerate(constants.items()):
        operator = "MatMul" if constant.ndim == 2 else "Add"
        body += f" v{number} = {operator} ({value}, {name})"
        value = f"v{number}"
    return graph_of("float[n, 32] x", "float[n, m] y", f"{body} y = Identity ({value})", **constants)


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of each external tensor of an ONNX file, by initializer."""
    found = {}
    for name, value in ir.load(file).graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.location == "weights.bin"
            found[name] = value.const_value.offset or 0, value.const_value.length or 0
    return found


def run_file(file: Path, **values: Any) -> list[NDArray[Any]]:
    return list(onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, values))


X = RNG.standard_normal((3, 32), np.float32)


def test_written_models_give_the_same(tmp_path: Path) -> None:
    models = {"one": product(a=LARGE, b=SMALL), "two": product(c=MIDDLE), "three": product(d=LARGE)}
    with WeightStore(tmp_path) as store:
        for name, model in models.items():
            store.save(model, f"{name}.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx", "three.onnx", "two.onnx", "weights.bin"]
    for name, model in models.items():
        (expected,) = run(model, x=X).values()
        np.testing.assert_array_equal(run_file(tmp_path / f"{name}.onnx", x=X)[0], expected)


def test_the_same_tensor_is_stored_once(tmp_path: Path) -> None:
    """Under whatever name, in one model or several, as one object or as equal ones; other contents by themselves."""
    other = LARGE.copy()
    other[-1, -1] += 1
    with WeightStore(tmp_path) as store:
        store.save(product(a=LARGE), "one.onnx")
        store.save(product(b=LARGE.copy()), "two.onnx")
        store.save(product(c=other), "three.onnx")
    first, second, third = (places(tmp_path / f"{name}.onnx") for name in ("one", "two", "three"))
    assert first["a"] == second["b"] == (0, LARGE.nbytes)
    assert third["c"] == (2 * PAGE, LARGE.nbytes)
    assert (tmp_path / "weights.bin").stat().st_size == 2 * PAGE + LARGE.nbytes


def test_stages_of_one_graph_share_their_tensors(tmp_path: Path) -> None:
    model = product(a=LARGE)
    with WeightStore(tmp_path) as store:
        store.save(model, "one.onnx")
        store.save(model.clone(), "two.onnx")
    assert places(tmp_path / "one.onnx") == places(tmp_path / "two.onnx")
    assert (tmp_path / "weights.bin").stat().st_size == LARGE.nbytes


def test_where_tensors_start(tmp_path: Path) -> None:
    sizes = {"a": MIDDLE, "b": LARGE, "c": MIDDLE + 1, "d": LARGE + 1, "e": MIDDLE + 2}
    with WeightStore(tmp_path) as store:
        for name, constant in sizes.items():
            store.save(product(w=constant), f"{name}.onnx")
    end = 0
    content = (tmp_path / "weights.bin").read_bytes()
    for name, constant in sizes.items():
        offset, length = places(tmp_path / f"{name}.onnx")["w"]
        assert length == constant.nbytes
        assert offset % (PAGE if constant.nbytes >= PAGE else LINE) == 0
        assert 0 <= offset - end < PAGE
        assert content[offset : offset + length] == constant.tobytes()
        end = offset + length
    assert len(content) == end


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_sizes_lie_apart_and_are_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    rng = np.random.default_rng(seed)
    constants = [rng.standard_normal(size, np.float32) for size in sizes]
    with WeightStore(folder) as store:
        for number, constant in enumerate(constants):
            store.save(graph_of("float[n] x", "float[n] y", "y = Add (x, w)", w=constant), f"{number}.onnx")
    content = (folder / "weights.bin").read_bytes()
    taken = []
    for number, constant in enumerate(constants):
        value = ir.load(folder / f"{number}.onnx").graph.initializers["w"].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), constant)
        if constant.nbytes >= INLINE:
            offset, length = places(folder / f"{number}.onnx")["w"]
            assert content[offset : offset + length] == constant.tobytes()
            taken.append((offset, offset + length))
        else:
            assert places(folder / f"{number}.onnx") == {}
    for (_, end), (start, _) in zip(sorted(set(taken)), sorted(set(taken))[1:], strict=False):
        assert end <= start


def test_small_tensors_stay_in_the_file(tmp_path: Path) -> None:
    border = np.ones((1, INLINE // 4 - 1), np.float32), np.ones((1, INLINE // 4), np.float32)
    with WeightStore(tmp_path) as store:
        for number, constant in enumerate(border):
            store.save(graph_of("float[n, m] x", "float[n, m] y", "y = Add (x, w)", w=constant), f"{number}.onnx")
    assert places(tmp_path / "0.onnx") == {}
    assert places(tmp_path / "1.onnx") == {"w": (0, INLINE)}


def test_the_model_keeps_its_tensors(tmp_path: Path) -> None:
    model = product(a=LARGE, b=SMALL)
    before = contents(model)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    with WeightStore(tmp_path) as store:
        store.save(model, "model.onnx")
        store.save(model, "again.onnx")
    assert contents(model) == before
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == tensors


def test_tensors_that_lie_in_another_file(tmp_path: Path) -> None:
    """As the exporter leaves them: small ones are taken in, large ones moved, and the source can be read again."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    model = product(a=LARGE, b=SMALL)
    (expected,) = run(model, x=X).values()
    ir.save(model, source / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    loaded = ir.load(source / "model.onnx")
    assert isinstance(loaded.graph.initializers["b"].const_value, ir.ExternalTensor)
    with WeightStore(target) as store:
        store.save(loaded, "model.onnx")
        store.save(loaded, "again.onnx")
    np.testing.assert_array_equal(loaded.graph.initializers["a"].const_value.numpy(), LARGE)
    for file in source.iterdir():
        file.unlink()
    for name in ("model.onnx", "again.onnx"):
        assert places(target / name) == {"a": (0, LARGE.nbytes)}
        np.testing.assert_array_equal(run_file(target / name, x=X)[0], expected)


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.uint8, np.bool_])
def test_other_types(tmp_path: Path, dtype: type) -> None:
    constant = RNG.integers(0, 2, 3000).astype(dtype)
    model = graph_of("int64[n] x", "float[n] y", "z = Cast <to = 1> (w) y = Gather (z, x)", w=constant)
    with WeightStore(tmp_path) as store:
        store.save(model, "model.onnx")
    assert places(tmp_path / "model.onnx") == {"w": (0, constant.nbytes)}
    picked = np.array([2999, 0, 7])
    np.testing.assert_array_equal(run_file(tmp_path / "model.onnx", x=picked)[0], constant[picked])


def test_equal_bytes_of_two_types_share_their_place(tmp_path: Path) -> None:
    whole = np.arange(3000)
    with WeightStore(tmp_path) as store:
        store.save(graph_of("int64[n] x", "int64[n] y", "y = Gather (w, x)", w=whole), "whole.onnx")
        halves = whole.view(np.float16)
        store.save(graph_of("int64[n] x", "float16[n] y", "y = Gather (w, x)", w=halves), "halves.onnx")
    assert places(tmp_path / "whole.onnx") == places(tmp_path / "halves.onnx")
    picked = np.array([0, 5, 2999])
    np.testing.assert_array_equal(run_file(tmp_path / "whole.onnx", x=picked)[0], whole[picked])
    np.testing.assert_array_equal(run_file(tmp_path / "halves.onnx", x=picked)[0], halves[picked])


def test_closing_twice(tmp_path: Path) -> None:
    with WeightStore(tmp_path, name="other.bin") as store:
        store.save(product(a=LARGE), "model.onnx")
    store.close()
    assert (tmp_path / "other.bin").stat().st_size == LARGE.nbytes
