"""Engines of TensorRT: what is refused, and in which order the library is called. Nothing here needs a GPU.

``Library`` records the calls of a TensorRT that has one engine; plans that do not open are given to TensorRT-RTX itself
where it is installed.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from controlrt.runtime.cuda.gpu import Gpu
from controlrt.runtime.cuda.tensorrt import TensorRtLibrary
from controlrt.runtime.errors import BundleError
from controlrt.runtime.manifest import Engine, Program

ADA = Gpu(name="NVIDIA L40S", compute_capability="8.9")
STREAM = 77
ENGINE = Engine(
    builder="tensorrt-rtx",
    version="1.7.1",
    compute_capabilities=(),
    gpu=None,
    build_seconds=1.0,
    optimization_profiles=2,
    refittable=False,
    stripped=False,
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


@dataclass(frozen=True)
class Tensor:
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float16))


class Context:
    """Records what is asked of it; ``y`` has the shape of ``x``, scratch is 100 bytes an element of ``x``."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls, self.shapes = calls, {"clip": (1, 3)}
        self.starts = True

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.calls.append(("profile", profile, stream))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"] if name == "y" else self.shapes[name]

    def update_device_memory_size_for_shapes(self) -> int:
        return 100 * int(np.prod(self.shapes["x"]))

    def set_device_memory(self, address: int, size: int) -> None:
        self.calls.append(("scratch", address, size))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls.append(("address", name, address))
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append(("execute", stream))
        return self.starts


class PlanEngine:
    """``y = f(x, clip)``; profiles: rows 2, and rows 1 to 4 with other sides."""

    num_io_tensors, num_optimization_profiles = 3, 2
    shapes: ClassVar = {"x": (-1, 8), "clip": (1, 3), "y": (-1, 8)}
    profiles: ClassVar = [((2, 8), (2, 8), (2, 8)), ((1, 8), (2, 8), (4, 8))]

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls, self.contexts, self.config = calls, [], SimpleNamespace()

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return "float32" if name == "clip" else "float16"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        assert name == "x", "what has one shape is in no profile"
        return self.profiles[profile]

    def create_runtime_config(self) -> SimpleNamespace:
        def strategy(each: Any) -> None:
            self.config.allocation = each

        self.config.set_execution_context_allocation_strategy = strategy
        self.config.create_runtime_cache = RuntimeCache
        self.config.set_runtime_cache = lambda cache: setattr(self.config, "cache", cache)
        return self.config

    def create_execution_context(self, asked: Any) -> Context:
        self.calls.append(("context", asked))
        self.contexts.append(Context(self.calls))
        return self.contexts[-1]


class RuntimeCache:
    """Kernels compiled so far."""

    read: ClassVar[list[bytes]] = []

    def deserialize(self, content: bytes) -> bool:
        self.read.append(content)
        return True

    def serialize(self) -> bytes:
        return b"kernels"


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class Logger:
    Severity = Severity


class Runtime:
    def __init__(self, logger: Any, engine: PlanEngine) -> None:
        self.logger, self.engine = logger, engine

    def deserialize_cuda_engine(self, plan: bytes) -> PlanEngine | None:
        if plan != b"a plan":
            self.logger.log(Severity.ERROR, plan.decode())
            return None
        return self.engine


class Library:
    """The fake library: ``calls`` in order, and its one engine."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.engine = PlanEngine(self.calls)
        self.module = SimpleNamespace(
            __version__="1.7.1",
            ILogger=Logger,
            Runtime=lambda logger: Runtime(logger, self.engine),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
            CudaGraphStrategy=SimpleNamespace(DISABLED="disabled"),
            nptype=np.dtype,
        )


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, fake.module)
    RuntimeCache.read = []
    return fake


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "unet.step.plan"
    file.write_bytes(b"a plan")
    return file


def changed(**values: Any) -> Program:
    return msgspec.structs.replace(PROGRAM, engine=msgspec.structs.replace(ENGINE, **values))


def call(rows: int, base: int = 0x1000) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    clip = Tensor(base + 1, (1, 3), np.dtype(np.float32))
    return {"x": Tensor(base, (rows, 8)), "clip": clip}, {"y": Tensor(base + 2, (rows, 8))}


def test_a_launch_enqueues_and_nothing_else(library: Library, plan: Path) -> None:
    engine = TensorRtLibrary("tensorrt-rtx", ADA, STREAM).open(PROGRAM, plan)
    assert engine.scratch_bytes({"x": (2, 8), "clip": (1, 3)}) == 1600
    engine.use_scratch(0x9000, 4096)
    launch = engine.launch(*call(2))
    library.calls.clear()
    launch()
    assert library.calls == [
        ("address", "x", 0x1000),
        ("address", "clip", 0x1001),
        ("address", "y", 0x1002),
        ("execute", STREAM),
    ]
    library.calls.clear()
    launch()
    assert library.calls == [("execute", STREAM)]


def test_calls_of_one_shape_take_turns_on_one_context(library: Library, plan: Path) -> None:
    engine = TensorRtLibrary("tensorrt-rtx", ADA, STREAM).open(PROGRAM, plan)
    first, second = engine.launch(*call(2)), engine.launch(*call(2, base=0x2000))
    assert len(library.engine.contexts) == 1
    for launch, address in ((first, 0x1000), (second, 0x2000), (first, 0x1000)):
        library.calls.clear()
        launch()
        assert ("address", "x", address) in library.calls
    engine.launch(*call(3))
    assert len(library.engine.contexts) == 2


@pytest.mark.parametrize(("rows", "profile"), [(2, None), (1, 1), (4, 1)])
def test_the_first_profile_that_fits_is_chosen(library: Library, plan: Path, rows: int, profile: int | None) -> None:
    TensorRtLibrary("tensorrt-rtx", ADA, STREAM).open(PROGRAM, plan).launch(*call(rows))
    chosen = [each for each in library.calls if each[0] == "profile"]
    assert chosen == ([] if profile is None else [("profile", profile, STREAM)])


def test_scratch_is_lent_to_launches_made_before_and_after(library: Library, plan: Path) -> None:
    engine = TensorRtLibrary("tensorrt-rtx", ADA, STREAM).open(PROGRAM, plan)
    engine.launch(*call(2))
    engine.use_scratch(0x9000, 2400)
    engine.launch(*call(3))
    assert [each for each in library.calls if each[0] == "scratch"] == [("scratch", 0x9000, 2400)] * 2
    with pytest.raises(BundleError, match=r"unet\.step needs 3200 bytes of scratch, not 2400"):
        engine.launch(*call(4))


def test_how_contexts_are_made(library: Library, plan: Path, tmp_path: Path) -> None:
    """TensorRT-RTX compiles before it runs, since a captured launch never changes, and keeps what it compiled."""
    compiled = tmp_path / "compiled" / "kernels.cache"
    with TensorRtLibrary("tensorrt-rtx", ADA, STREAM, compiled) as opened:
        opened.keep_compiled()
        assert not compiled.exists()  # nothing yet
        opened.open(PROGRAM, plan).launch(*call(2))
        config = library.engine.config
        assert config.allocation == "user managed"
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert config.cuda_graph_strategy == "disabled"
        opened.keep_compiled()
    assert compiled.read_bytes() == b"kernels"
    with TensorRtLibrary("tensorrt-rtx", ADA, STREAM, compiled) as opened:
        opened.open(PROGRAM, plan).launch(*call(2))
        assert RuntimeCache.read == [b"kernels"]
        compiled.unlink()
        opened.keep_compiled()
        assert not compiled.exists()  # it holds nothing new
    with TensorRtLibrary("tensorrt", ADA, STREAM) as opened:
        opened.open(changed(builder="tensorrt"), plan).launch(*call(2))
    assert library.calls[-1] == ("context", "user managed")


@pytest.mark.parametrize(
    ("rows", "says"),
    [(5, r"not built for x \(5, 8\), built for \(1, 8\) to \(4, 8\); .*--batch"), (0, "not built for x")],
)
def test_a_shape_outside_every_profile(library: Library, plan: Path, rows: int, says: str) -> None:
    engine = TensorRtLibrary("tensorrt-rtx", ADA, STREAM).open(PROGRAM, plan)
    with pytest.raises(BundleError, match=says):
        engine.launch(*call(rows))
    assert library.engine.contexts == []


@pytest.mark.usefixtures("library")
def test_tensors_that_do_not_fit(plan: Path) -> None:
    engine = TensorRtLibrary("tensorrt-rtx", ADA, STREAM).open(PROGRAM, plan)
    inputs, outputs = call(2)
    with pytest.raises(BundleError, match="tensor clip is missing"):
        engine.launch({"x": inputs["x"]}, outputs)
    with pytest.raises(BundleError, match="tensor z is unknown"):
        engine.launch({**inputs, "z": inputs["x"]}, outputs)
    with pytest.raises(BundleError, match="tensor clip is float16, not float32"):
        engine.launch({**inputs, "clip": Tensor(1, (1, 3))}, outputs)
    with pytest.raises(BundleError, match=r"writes y as \(2, 8\), not \(3, 8\)"):
        engine.launch(inputs, call(3)[1])


def test_a_launch_that_does_not_start(library: Library, plan: Path) -> None:
    opened = TensorRtLibrary("tensorrt-rtx", ADA, STREAM)
    launch = opened.open(PROGRAM, plan).launch(*call(2))
    library.engine.contexts[0].starts = False
    opened.runtime.logger.log(Severity.ERROR, "the stream is gone")
    with pytest.raises(BundleError, match=r"unet\.step did not start: the stream is gone"):
        launch()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"version": "1.6.0"}, r"by TensorRT-RTX 1\.6\.0, here is 1\.7\.1; pip install 'tensorrt-rtx-cu13==1\.6\.0'"),
        ({"builder": "tensorrt"}, "was built by TensorRT, not TensorRT-RTX"),
        ({"compute_capabilities": ("8.6", "12.0")}, r"8\.6 and 12\.0; this GPU is NVIDIA L40S, 8\.9"),
        ({"compute_capabilities": ("9.0",), "gpu": "NVIDIA H100"}, r"for NVIDIA H100, compute capability 9\.0"),
        ({"stripped": True}, "without its weights"),
    ],
)
@pytest.mark.usefixtures("library")
def test_an_engine_that_does_not_fit(plan: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(BundleError, match=says):
        TensorRtLibrary("tensorrt-rtx", ADA, STREAM).open(changed(**values), plan)


@pytest.mark.parametrize(
    "values",
    [{"version": "1.6.0", "version_compatible": True}, {"compute_capabilities": ("8.9", "12.0")}],
)
@pytest.mark.usefixtures("library")
def test_an_engine_that_fits(plan: Path, values: dict[str, Any]) -> None:
    opened = TensorRtLibrary("tensorrt-rtx", ADA, STREAM)
    opened.open(changed(**values), plan)
    assert getattr(opened.runtime, "engine_host_code_allowed", False) == ("version_compatible" in values)


def test_another_gpu_of_the_same_kind_is_told(library: Library, plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    library.module.__version__ = "11.0"
    program = changed(builder="tensorrt", version="11.0", compute_capabilities=("8.9",), gpu="NVIDIA RTX 4090")
    TensorRtLibrary("tensorrt", ADA, STREAM).open(program, plan)
    assert "tuned for NVIDIA RTX 4090; this GPU is NVIDIA L40S" in caplog.text


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("Serialization assertion header.magicTag failed", "damaged; build the bundle again"),
        ("CUDA driver version is insufficient for CUDA runtime version", "missing or too old .*update it"),
        ("Requested amount of GPU memory (123 bytes) could not be allocated", "memory is full"),
        ("something else", "something else; build the bundle again"),
    ],
)
@pytest.mark.usefixtures("library")
def test_a_plan_that_does_not_open(tmp_path: Path, log: str, says: str) -> None:
    file = tmp_path / "unet.step.plan"
    file.write_bytes(log.encode())
    with pytest.raises(BundleError, match=f"TensorRT-RTX 1.7.1 cannot open it; .*{says}"):
        TensorRtLibrary("tensorrt-rtx", ADA, STREAM).open(PROGRAM, file)


@pytest.mark.parametrize(
    ("builder", "module", "says"),
    [
        ("tensorrt", "tensorrt", r"is for TensorRT, .*controlrt\[tensorrt\].*NVIDIA's own index"),
        ("tensorrt-rtx", "tensorrt_rtx", r"is for TensorRT-RTX, .*controlrt\[tensorrt-rtx\]"),
    ],
)
def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, builder: str, module: str, says: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BundleError, match=says):
        TensorRtLibrary(builder, ADA, STREAM)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_tensorrt_rtx_itself_says_so(tmp_path: Path) -> None:
    import tensorrt_rtx

    file = tmp_path / "unet.step.plan"
    file.write_bytes(b"no plan at all" * 100)
    with (
        TensorRtLibrary("tensorrt-rtx", ADA, STREAM) as opened,
        pytest.raises(BundleError, match=r"cannot open it; it is damaged"),
    ):
        opened.open(changed(version=tensorrt_rtx.__version__), file)
