"""Engines that get other weights: which ones are given by which name, and every way in which that ends badly.

The library is the one of ``fake_tensorrt``, in a process of its own as the real one. TensorRT-RTX itself says here what
it says without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from controlrt.compiler.weights import WeightStore
from controlrt.engines.tensorrt import builder, refit_child, refitter
from controlrt.engines.tensorrt.builder import TensorRtBuilder
from controlrt.engines.tensorrt.process import REFUSED
from controlrt.engines.tensorrt.refitter import TensorRtRefitter
from controlrt.engines.tensorrt.request import RefitRequest
from controlrt.runtime.cuda.gpu import Gpu, find_gpu
from controlrt.runtime.errors import BuildError, DeviceError, OutputError, UserError
from controlrt.runtime.manifest import Engine, Program

rtx = pytest.mark.skipif(not TensorRtBuilder("tensorrt-rtx").is_installed(), reason="the extra tensorrt-rtx is absent")
ADA = Gpu(name="NVIDIA L40S", compute_capability="8.9")
BUILT = {"weight": np.arange(6, dtype=np.float16).reshape(2, 3), "bias": np.ones(3, np.float16)}
NEW = {"weight": np.full((2, 3), 7, np.float16), "bias": np.full(3, 8, np.float16)}
ENGINE = Engine(
    builder="tensorrt-rtx",
    version="1.7.1",
    compute_capabilities=("8.9",),
    gpu=None,
    build_seconds=1.0,
    optimization_profiles=1,
    refittable=True,
    stripped=True,
    version_compatible=False,
)
PROGRAM = Program(
    name="unet.step",
    part="unet",
    stage="step",
    file="programs/unet.step.plan",
    cost=None,
    inputs=(),
    outputs=(),
    max_relative_error=0.0,
    export_seconds=0.0,
    engine=ENGINE,
)


def onnx(directory: Path) -> Path:
    """``x @ weight + bias`` with the new weights."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", 2]), type=ir.TensorType(ir.DataType.FLOAT16))
    weights = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in NEW.items()}
    product = ir.node("MatMul", [x, weights["weight"]])
    total = ir.node("Add", [product.outputs[0], weights["bias"]])
    nodes, initializers = [product, total], list(weights.values())
    graph = ir.Graph([x], total.outputs, nodes=nodes, initializers=initializers, opset_imports={"": 23})
    with WeightStore(directory) as store:
        store.save(ir.Model(graph, ir_version=10), "unet.step.onnx")
    return directory / "unet.step.onnx"


def plan(directory: Path, *, stripped: bool = True, refittable: bool = True) -> Path:
    file = directory / "built.plan"
    file.write_bytes(fake_tensorrt.make_plan(BUILT, refittable=refittable, stripped=stripped))
    return file


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitter, "CHILD", fake_tensorrt.REFIT)


def refit(directory: Path, changed: tuple[str, ...] = ("weight", "bias"), **kind: Any) -> tuple[Program, bytes]:
    target = directory / "refitted.plan"
    made = TensorRtRefitter("tensorrt-rtx").refit(PROGRAM, onnx(directory), changed, plan(directory, **kind), target)
    return made, target.read_bytes()


@pytest.mark.parametrize("stripped", [True, False])
def test_every_weight_is_given_by_its_name(tmp_path: Path, stripped: bool) -> None:
    made, written = refit(tmp_path, stripped=stripped)
    found = fake_tensorrt.weights_of(written)
    assert found.keys() == NEW.keys()
    for name, array in NEW.items():
        np.testing.assert_array_equal(found[name], array.ravel())
    traits = fake_tensorrt.traits_of(written)
    assert (traits["refittable"], traits["stripped"]) == (True, False)
    assert made.engine is not None
    assert (made.engine.stripped, made.engine.refittable) == (False, True)
    assert made.engine.refit_seconds is not None
    assert msgspec.structs.replace(made.engine, stripped=True, refit_seconds=None) == ENGINE


def test_what_the_parser_makes_of_nodes_comes_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it says of the rest."""
    monkeypatch.setenv(fake_tensorrt.FAILS, "node")
    _, written = refit(tmp_path)
    np.testing.assert_array_equal(fake_tensorrt.weights_of(written)["weight"], NEW["weight"].ravel())


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("deserialize", "the engine does not open here"),
        ("fixed", "the engine keeps these weights as they were built: bias"),
        ("refuse", "the engine does not take weight, bias"),
        ("size", "the engine does not take weight, bias"),
        ("missing", "weights are missing: somewhere.weight"),
        ("refit", "the refit failed"),
        ("serialize", "the engine cannot be written"),
    ],
)
def test_whatever_the_library_refuses_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], failure: str, says: str
) -> None:
    monkeypatch.setenv(fake_tensorrt.FAILS, failure)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt)
    request = RefitRequest(
        flavour="tensorrt-rtx",
        onnx=str(onnx(tmp_path)),
        plan=str(plan(tmp_path)),
        refitted=str(tmp_path / "refitted.plan"),
        answer=str(tmp_path / "answer.json"),
        changed=["bias", "weight"],
        version_compatible=False,
    )
    (tmp_path / "request.json").write_bytes(msgspec.json.encode(request))
    assert refit_child.main(str(tmp_path / "request.json")) == REFUSED
    assert capfd.readouterr().out == f"[E] {says}\n"
    assert not (tmp_path / "refitted.plan").exists()
    assert not (tmp_path / "answer.json").exists()


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("refit", r"refuses it when it is refitted; build a bundle .*\[E\] the refit failed$"),
        ("crash", r"crashed \(SIGSEGV\) when it is refitted; build a bundle of these weights"),
        ("kill", "was killed when it is refitted; was there enough memory"),
    ],
)
def test_a_library_that_ends_badly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, says: str) -> None:
    monkeypatch.setenv(fake_tensorrt.FAILS, failure)
    with pytest.raises(BuildError, match=rf"(?s)^program unet\.step: tensorrt-rtx {says}"):
        refit(tmp_path)


def test_an_engine_that_was_not_built_for_it(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"(?s)unet\.step.* was not built to be refitted"):
        refit(tmp_path, refittable=False)


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        ("import no_such_module", BuildError, "failed with exit code 1 .* pip install 'controlrt.tensorrt-rtx.'"),
        ("print('[E] nothing')", BuildError, "ended without an engine"),
        ("raise OSError(28, 'No space left on device')", OutputError, "no space left while refitting .* unet.step"),
    ],
)
def test_a_process_that_ends_badly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception], says: str
) -> None:
    monkeypatch.setattr(refitter, "CHILD", (sys.executable, "-c", code))
    with pytest.raises(error, match=rf"(?s){says}"):
        refit(tmp_path)


@rtx
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64])
def test_the_bindings_take_weights_of_every_type(dtype: type[np.generic]) -> None:
    """Also read-only ones, as of a file that is mapped."""
    import tensorrt_rtx as trt

    array = np.arange(6, dtype=dtype).reshape(2, 3)
    array.flags.writeable = False
    kind = {np.float16: trt.float16, np.float32: trt.float32, np.int64: trt.int64}[dtype]
    prototype, given = trt.Weights(kind, array.ctypes.data, 6), {}
    refitter = SimpleNamespace(
        get_weights_prototype=lambda _: prototype,
        set_named_weights=lambda name, weights: given.update({name: np.array(weights.numpy())}) or True,
    )
    assert refit_child._give(trt, refitter, "weight", array)
    np.testing.assert_array_equal(given["weight"], array.ravel())
    assert not refit_child._give(trt, refitter, "weight", array[:1])


@rtx
@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
def test_what_tensorrt_rtx_says_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine opens, so there is nothing to make a refitter of."""
    monkeypatch.setattr(refitter, "CHILD", (sys.executable, "-m", refit_child.__name__))
    with pytest.raises(BuildError, match=r"(?s)unet\.step: .* the engine does not open here") as failed:
        refit(tmp_path)
    assert "CUDA driver version is insufficient for CUDA runtime version" in str(failed.value)


@rtx
@pytest.mark.parametrize(
    ("gpu", "changes", "error", "says"),
    [
        (None, {}, DeviceError, "refitted on a GPU that runs them, and there is none here; refit the bundle on"),
        (ADA, {"version": "1.6.0"}, UserError, r"built by tensorrt-rtx 1\.6\.0, here is"),
        (ADA, {"version": "1.7.1.11"}, UserError, r"built by tensorrt-rtx 1\.7\.1\.11, here is"),
        (ADA, {"compute_capabilities": ("8.6", "12.0")}, DeviceError, r"8\.6, 12\.0, and NVIDIA L40S has 8\.9"),
    ],
    ids=["no GPU", "version", "the beginning of a number", "capability"],
)
def test_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    for module in (builder, refitter):
        monkeypatch.setattr(module, "find_gpu", lambda: gpu)
    here = {"version": TensorRtBuilder("tensorrt-rtx").versions()["tensorrt-rtx"]}
    with pytest.raises(error, match=says):
        TensorRtRefitter("tensorrt-rtx").check([msgspec.structs.replace(ENGINE, **{**here, **changes})])


@rtx
def test_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (builder, refitter):
        monkeypatch.setattr(module, "find_gpu", lambda: ADA)
    version = TensorRtBuilder("tensorrt-rtx").versions()["tensorrt-rtx"]
    TensorRtRefitter("tensorrt-rtx").check([msgspec.structs.replace(ENGINE, version=version)])


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitter, "find_gpu", lambda: ADA)
    monkeypatch.setattr(TensorRtBuilder, "is_installed", lambda _: False)
    with pytest.raises(UserError, match=r"tensorrt is not installed here; pip install 'controlrt\[tensorrt\]'"):
        TensorRtRefitter("tensorrt").check([ENGINE])
