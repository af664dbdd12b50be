"""Engines of TensorRT: what is refused, and in which order the library is called. Nothing here needs a GPU.

``Library`` records the calls of a TensorRT that has one engine; plans that do not open are given to TensorRT-RTX itself
where it is installed.
"""

from __future__ import annotations

import enum
import gc
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from controlrt.runtime.cuda.device import MAIN, SIDE, DeviceAbout, DeviceArray
from controlrt.runtime.cuda.tensorrt import TensorRtEngine, TensorRtLibrary
from controlrt.runtime.errors import BundleError, DeviceMemoryError
from controlrt.runtime.manifest import Engine, Program

ADA = SimpleNamespace(
    about=DeviceAbout(
        index=0, name="NVIDIA L40S", compute_capability=(8, 9), total_bytes=2**35, driver_version=(13, 0)
    ),
    streams=(77, 78),
    free_bytes=lambda: 2**20,
)
"""What an engine asks of its device."""
HALF = np.dtype(np.float16)
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
        self.runtimes: list[Runtime] = []
        self.module = SimpleNamespace(
            __version__="1.7.1",
            ILogger=Logger,
            Runtime=self.create_runtime,
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
            CudaGraphStrategy=SimpleNamespace(DISABLED="disabled"),
            nptype=np.dtype,
        )

    def create_runtime(self, logger: Any) -> Runtime:
        self.runtimes.append(Runtime(logger, self.engine))
        return self.runtimes[-1]


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


def call(rows: int, base: int = 0x1000) -> tuple[dict[str, DeviceArray], dict[str, DeviceArray]]:
    clip = DeviceArray(base + 0x100, (1, 3), np.dtype(np.float32))
    return {"x": DeviceArray(base, (rows, 8), HALF), "clip": clip}, {"y": DeviceArray(base + 0x200, (rows, 8), HALF)}


def opened(plan: Path, program: Program = PROGRAM, stream: int = MAIN, **options: Any) -> TensorRtEngine:
    return TensorRtLibrary("tensorrt-rtx", ADA, **options).open(program, plan, stream)


@pytest.mark.parametrize(("stream", "handle"), [(MAIN, 77), (SIDE, 78)])
def test_a_launch_enqueues_and_nothing_else(library: Library, plan: Path, stream: int, handle: int) -> None:
    launch = opened(plan, stream=stream).bind(*call(2))
    assert launch.scratch_bytes == 1600
    launch.use_scratch(0x9000)
    library.calls.clear()
    launch()
    assert library.calls == [
        ("scratch", 0x9000, 1600),
        ("address", "x", 0x1000),
        ("address", "clip", 0x1100),
        ("address", "y", 0x1200),
        ("execute", handle),
    ]
    library.calls.clear()
    launch()
    assert library.calls == [("execute", handle)]


def test_calls_of_one_shape_take_turns_on_one_context(library: Library, plan: Path) -> None:
    engine = opened(plan)
    first, second = engine.bind(*call(2)), engine.bind(*call(2, base=0x2000))
    first.use_scratch(0x9000)
    second.use_scratch(0x9900)
    assert len(library.engine.contexts) == 1
    for launch, address, scratch in ((first, 0x1000, 0x9000), (second, 0x2000, 0x9900), (first, 0x1000, 0x9000)):
        library.calls.clear()
        launch()
        assert ("address", "x", address) in library.calls
        assert ("scratch", scratch, 1600) in library.calls
    third = engine.bind(*call(3))
    assert third.scratch_bytes > 0
    assert len(library.engine.contexts) == 2


@pytest.mark.usefixtures("library")
def test_memory_that_is_not_aligned_is_refused(plan: Path) -> None:
    with pytest.raises(BundleError, match=r"unet.step: memory of x, clip, y is not aligned to 256"):
        opened(plan).bind(*call(2, base=0x1004))


def test_a_context_goes_with_its_last_launch(library: Library, plan: Path) -> None:
    engine = opened(plan)
    launch = engine.bind(*call(2))
    assert len(engine._contexts) == 1
    del launch
    gc.collect()
    assert len(engine._contexts) == 0
    engine.bind(*call(2))
    assert len(library.engine.contexts) == 2


@pytest.mark.parametrize(("rows", "profile"), [(2, None), (1, 1), (4, 1)])
def test_the_first_profile_that_fits_is_chosen(library: Library, plan: Path, rows: int, profile: int | None) -> None:
    opened(plan, stream=SIDE).bind(*call(rows))
    chosen = [each for each in library.calls if each[0] == "profile"]
    assert chosen == ([] if profile is None else [("profile", profile, 78)])


def test_how_contexts_are_made(library: Library, plan: Path, tmp_path: Path) -> None:
    """TensorRT-RTX compiles before it runs, since a captured launch never changes, and keeps what it compiled."""
    compiled = tmp_path / "compiled" / "kernels.cache"
    with TensorRtLibrary("tensorrt-rtx", ADA, compiled) as first:
        first.keep_compiled()
        assert not compiled.exists()  # nothing yet
        first.open(PROGRAM, plan, MAIN).bind(*call(2))
        config = library.engine.config
        assert config.allocation == "user managed"
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert config.cuda_graph_strategy == "disabled"
    assert compiled.read_bytes() == b"kernels"
    with TensorRtLibrary("tensorrt-rtx", ADA, compiled) as second:
        second.open(PROGRAM, plan, MAIN).bind(*call(2))
        assert RuntimeCache.read == [b"kernels"]
        compiled.unlink()
    assert not compiled.exists()  # it held nothing new


def test_tensorrt_compiles_nothing(library: Library, plan: Path, tmp_path: Path) -> None:
    compiled = tmp_path / "kernels.cache"
    with TensorRtLibrary("tensorrt", ADA, compiled) as opened_for_tensorrt:
        opened_for_tensorrt.open(changed(builder="tensorrt"), plan, MAIN).bind(*call(2))
    assert ("context", "user managed") in library.calls
    assert not compiled.exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [(5, r"not built for x \(5, 8\), built for \(1, 8\) to \(4, 8\); .*--batch"), (0, "not built for x")],
)
def test_a_shape_outside_every_profile(library: Library, plan: Path, rows: int, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        opened(plan).bind(*call(rows))
    assert library.engine.contexts == []


@pytest.mark.usefixtures("library")
def test_arrays_that_do_not_fit(plan: Path) -> None:
    engine = opened(plan)
    inputs, outputs = call(2)
    with pytest.raises(BundleError, match="tensor clip is missing"):
        engine.bind({"x": inputs["x"]}, outputs)
    with pytest.raises(BundleError, match="tensor z is unknown"):
        engine.bind({**inputs, "z": inputs["x"]}, outputs)
    with pytest.raises(BundleError, match="tensor clip is float16, not float32"):
        engine.bind({**inputs, "clip": DeviceArray(1, (1, 3), HALF)}, outputs)
    with pytest.raises(BundleError, match=r"writes y as \(2, 8\), not \(3, 8\)"):
        engine.bind(inputs, call(3)[1])


def test_a_launch_that_does_not_start(library: Library, plan: Path) -> None:
    launch = opened(plan).bind(*call(2))
    library.engine.contexts[0].starts = False
    library.runtimes[-1].logger.log(Severity.ERROR, "the stream is gone")
    with pytest.raises(BundleError, match=r"unet\.step did not start: the stream is gone"):
        launch()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"version": "1.6.0"}, r"by TensorRT-RTX 1\.6\.0, here is 1\.7\.1; pip install 'tensorrt-rtx-cu13==1\.6\.0'"),
        ({"builder": "tensorrt"}, "was built by TensorRT, not TensorRT-RTX"),
        ({"compute_capabilities": ("8.6", "12.0")}, r"8\.6 and 12\.0; this GPU is NVIDIA L40S, 8\.9"),
        ({"compute_capabilities": ("9.0",), "gpu": "NVIDIA H100"}, r"for NVIDIA H100, compute capability 9\.0"),
        ({"stripped": True}, "built without its weights; give it some with: controlrt refit BUNDLE"),
    ],
)
@pytest.mark.usefixtures("library")
def test_an_engine_that_does_not_fit(plan: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(BundleError, match=says):
        opened(plan, changed(**values))


@pytest.mark.parametrize(
    "values",
    [{"version": "1.6.0", "version_compatible": True}, {"compute_capabilities": ("8.9", "12.0")}],
)
def test_an_engine_that_fits(library: Library, plan: Path, values: dict[str, Any]) -> None:
    opened(plan, changed(**values))
    assert getattr(library.runtimes[-1], "engine_host_code_allowed", False) == ("version_compatible" in values)


def test_another_gpu_of_the_same_kind_is_told(library: Library, plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    library.module.__version__ = "11.0"
    program = changed(builder="tensorrt", version="11.0", compute_capabilities=("8.9",), gpu="NVIDIA RTX 4090")
    TensorRtLibrary("tensorrt", ADA).open(program, plan, MAIN)
    assert "tuned for NVIDIA RTX 4090; this GPU is NVIDIA L40S" in caplog.text


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("Serialization assertion header.magicTag failed", "damaged; build the bundle again"),
        (
            "The engine cannot run on this GPU, which has compute capability 9.0. TensorRT-RTX does not support this "
            "compute capability, so the engine cannot be rebuilt for it.",
            r"does not run on compute capability \d+\.\d; build the bundle with --backend cuda or tensorrt",
        ),
        ("CUDA driver version is insufficient for CUDA runtime version", "missing or too old .*update it"),
        ("something else", "something else; build the bundle again"),
    ],
)
@pytest.mark.usefixtures("library")
def test_a_plan_that_does_not_open(tmp_path: Path, log: str, says: str) -> None:
    file = tmp_path / "unet.step.plan"
    file.write_bytes(log.encode())
    with pytest.raises(BundleError, match=f"TensorRT-RTX 1.7.1 cannot open it; .*{says}"):
        opened(file)


@pytest.mark.usefixtures("library")
def test_a_plan_that_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "unet.step.plan"
    file.write_text("Requested amount of GPU memory (3145728 bytes) could not be allocated")
    with pytest.raises(DeviceMemoryError, match="3 MiB are needed at once, and 1 MiB are free"):
        opened(file)


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
        TensorRtLibrary(builder, ADA)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_tensorrt_rtx_itself_says_so(tmp_path: Path) -> None:
    import tensorrt_rtx

    file = tmp_path / "unet.step.plan"
    file.write_bytes(b"no plan at all" * 100)
    with pytest.raises(BundleError, match=r"cannot open it; it is damaged"):
        opened(file, changed(version=tensorrt_rtx.__version__))
