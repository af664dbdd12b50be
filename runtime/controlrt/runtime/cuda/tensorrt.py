"""Runs TensorRT's plans: the library that a bundle was built with, and one engine of it for each program.

Both TensorRT and TensorRT-RTX have the same Python interface; which of them is imported is decided in one place. What
a launch enqueues can be captured in a CUDA graph: everything else, such as choosing an optimization profile, happens
when it is made.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

import numpy as np

from controlrt.runtime.cuda.device import Device, DeviceArrays
from controlrt.runtime.cuda.gpu import RTX_CAPABILITIES
from controlrt.runtime.cuda.memory import ALIGNMENT
from controlrt.runtime.errors import BundleError, DeviceMemoryError
from controlrt.runtime.manifest import Engine, Program
from controlrt.runtime.storage import atomic_file

Shapes = Mapping[str, tuple[int, ...]]

NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": "pip install 'controlrt[tensorrt]' (its wheel comes from NVIDIA's own index)",
    "tensorrt-rtx": "pip install 'controlrt[tensorrt-rtx]'",
}
WHEELS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
_log = logging.getLogger(__name__)


class TensorRtLibrary:
    """TensorRT or TensorRT-RTX, opened for one bundle; a context manager. A CUDA context must be current.

    Args:
        builder: which of the two, as ``Engine.builder`` says it.
        device: what will run the engines.
        compiled: where TensorRT-RTX keeps the kernels that it compiles when an engine first runs; nowhere where None.

    Raises:
        BundleError: it is not installed.
    """

    def __init__(self, builder: str, device: Device, compiled: Path | None = None) -> None:
        self.builder, self.device = builder, device
        try:
            self.module: Any = importlib.import_module(MODULES[builder])
        except (ImportError, OSError) as error:
            raise BundleError(
                f"this bundle is for {NAMES[builder]}, which cannot be imported here ({error}): {INSTALL[builder]}"
            ) from None
        self._messages: list[str] = []
        self.runtime: Any = self.module.Runtime(_logger(self.module, self._messages))
        self._compiled, self._cache, self._cached = compiled, None, b""

    def open(self, program: Program, file: Path, stream: int) -> TensorRtEngine:
        """Opens the plan of a program; see ``Engines``.

        Raises:
            BundleError: a plan of another version or for another GPU, one that is damaged or has no weights.
            DeviceMemoryError: it does not fit.
        """
        about = program.engine
        if about is None:
            raise BundleError(f"program {program.name} is no engine; build the bundle again with build-engines")
        self._refuse_misfits(program.name, about)
        if about.version_compatible:
            self.runtime.engine_host_code_allowed = True  # the plan brings its own runtime; the bundle's hashes vouch
        self._messages.clear()
        engine = self.runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise self.out_of_memory() or BundleError(
                f"{file}: {NAMES[self.builder]} {self.module.__version__} cannot open it; {self._why()}"
            )
        return TensorRtEngine(self, program, engine, self.device.streams[stream])

    def create_context(self, engine: Any) -> Any:
        """An execution context without scratch memory of its own."""
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.builder != "tensorrt-rtx":
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # a captured launch never gets the kernels that would otherwise be compiled beside it, so compile them first
        config.dynamic_shapes_kernel_specialization_strategy = (
            self.module.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        config.cuda_graph_strategy = self.module.CudaGraphStrategy.DISABLED  # launches are captured from outside
        if self._compiled is not None:
            self._cache = self._cache or self._open_cache(config)
            config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def keep_compiled(self) -> None:
        """Writes the kernels that were compiled so far to their file, so that the next process need not."""
        if self._cache is None or self._compiled is None:
            return
        content = bytes(self._cache.serialize())
        if content != self._cached:
            self._compiled.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._compiled) as partial:
                partial.write_bytes(content)
            self._cached = content

    def last_message(self) -> str:
        """The last error that the library logged."""
        return self._messages[-1] if self._messages else "it does not say why"

    def forget_messages(self) -> None:
        """What was logged so far says nothing of what comes."""
        self._messages.clear()

    def out_of_memory(self) -> DeviceMemoryError | None:
        """Of what the library logged since it was last asked for something, that there was not enough memory."""
        for message in self._messages:
            if found := re.search(r"memory \((\d+) bytes\)|allocat\w*.* (\d+) bytes", message):
                return DeviceMemoryError(
                    f"GPU {self.device.about.index}", int(found[1] or found[2]), self.device.free_bytes()
                )
        return None

    def close(self) -> None:
        """Keeps what was compiled, and releases the library, after its engines; safe to call twice."""
        with contextlib.suppress(OSError):
            self.keep_compiled()
        self._cache = self.runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_cache(self, config: Any) -> Any:
        cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            content = self._compiled.read_bytes() if self._compiled is not None else b""
            if content and cache.deserialize(content):
                self._cached = content
        return cache

    def _refuse_misfits(self, name: str, about: Engine) -> None:
        """Raises BundleError unless the engine was built for this library and this GPU."""
        again = "build the bundle again with build-engines"
        found = self.module.__version__
        if about.builder != self.builder:
            raise BundleError(f"program {name} was built by {NAMES[about.builder]}, not {NAMES[self.builder]}; {again}")
        if about.version != found and not about.version_compatible:
            wheel = WHEELS[self.builder]
            raise BundleError(
                f"program {name} was built by {NAMES[self.builder]} {about.version}, here is {found}; "
                f"pip install '{wheel}=={about.version}', or {again}"
            )
        gpu = self.device.about
        here = ".".join(map(str, gpu.compute_capability))
        if about.compute_capabilities and here not in about.compute_capabilities:
            built_for = f"{about.gpu}, " if about.gpu else ""
            named = " and ".join(about.compute_capabilities)
            other = f"tensorrt-rtx --compute-capability {here}" if here in RTX_CAPABILITIES else "cuda"
            raise BundleError(
                f"program {name} was built for {built_for}compute capability {named}; this GPU is {gpu.name}, "
                f"{here}; {again} on this machine, or with --backend {other}"
            )
        if about.gpu is not None and about.gpu != gpu.name:
            _log.warning(
                "program %s was tuned for %s; this GPU is %s, where it may be slower", name, about.gpu, gpu.name
            )
        if about.stripped:
            raise BundleError(
                f"program {name} was built without its weights; give it some with: controlrt refit BUNDLE"
            )

    def _why(self) -> str:
        """What the log of a plan that does not open means, and what mends it."""
        log = "\n".join(self._messages)
        if "magicTag" in log or "Serialization" in log or "checksum" in log:
            return "it is damaged; build the bundle again with build-engines"
        if "does not support this compute capability" in log:
            here = ".".join(map(str, self.device.about.compute_capability))
            return f"it does not run on compute capability {here}; build the bundle with --backend cuda or tensorrt"
        if "driver version" in log:
            return f"the GPU's driver is missing or too old ({self.last_message()}); update it"
        return f"{self.last_message()}; build the bundle again with build-engines on this machine"


class TensorRtEngine:
    """One program's engine; ``TensorRtLibrary.open`` makes it. See ``Engine``."""

    def __init__(self, library: TensorRtLibrary, program: Program, engine: Any, stream: int) -> None:
        self._library, self._program, self._engine, self._stream = library, program, engine, stream
        self._contexts: WeakValueDictionary[tuple[tuple[str, tuple[int, ...]], ...], _Context] = WeakValueDictionary()
        """By the shapes of inputs; each goes with the last launch that uses it."""
        self._dtypes = {
            (name := engine.get_tensor_name(index)): np.dtype(library.module.nptype(engine.get_tensor_dtype(name)))
            for index in range(engine.num_io_tensors)
        }

    def bind(self, inputs: DeviceArrays, outputs: DeviceArrays) -> TensorRtLaunch:
        """See ``Engine``.

        Raises:
            BundleError: tensors of another name, type or size than the program has.
        """
        tensors = {**inputs, **outputs}
        self._check(tensors)
        context = self._context({name: tensor.shape for name, tensor in inputs.items()})
        for name, tensor in outputs.items():
            expected = tuple(context.handle.get_tensor_shape(name))
            if tensor.shape != expected:
                raise BundleError(f"program {self._program.name} writes {name} as {expected}, not {tensor.shape}")
        addresses = {name: tensor.address for name, tensor in tensors.items()}
        if odd := [name for name, address in addresses.items() if address % ALIGNMENT]:
            raise BundleError(f"program {self._program.name}: memory of {', '.join(odd)} is not aligned to {ALIGNMENT}")
        return TensorRtLaunch(context, addresses, self._stream, self._failed)

    def _failed(self) -> BundleError:
        return BundleError(f"program {self._program.name} did not start: {self._library.last_message()}")

    def close(self) -> None:
        """See ``Engine``."""
        for context in list(self._contexts.values()):
            context.handle = None
        self._engine = None

    def _check(self, tensors: DeviceArrays) -> None:
        for name in sorted(self._dtypes.keys() | tensors.keys()):
            if name not in tensors or name not in self._dtypes:
                kind = "is missing" if name in self._dtypes else "is unknown"
                raise BundleError(f"program {self._program.name}: tensor {name} {kind}")
            if tensors[name].dtype != self._dtypes[name]:
                found, wanted = tensors[name].dtype, self._dtypes[name]
                raise BundleError(f"program {self._program.name}: tensor {name} is {found}, not {wanted}")

    def _context(self, shapes: Shapes) -> _Context:
        """The context for inputs of these shapes."""
        key = tuple(sorted(shapes.items()))
        context = self._contexts.get(key)
        if context is None:
            profile = self._profile(shapes)
            self._library.forget_messages()
            handle = self._library.create_context(self._engine)
            if handle is None or (profile and not handle.set_optimization_profile_async(profile, self._stream)):
                raise self._library.out_of_memory() or BundleError(
                    f"program {self._program.name} cannot be prepared: {self._library.last_message()}"
                )
            for name, shape in shapes.items():
                if not handle.set_input_shape(name, shape):
                    raise BundleError(f"program {self._program.name} does not take {name} as {shape}")
            context = self._contexts[key] = _Context(handle)
        return context

    def _profile(self, shapes: Shapes) -> int:
        """The first optimization profile that has these shapes."""
        ranges: dict[str, str] = {}
        for profile in range(self._engine.num_optimization_profiles):
            outside = []
            for name, shape in shapes.items():
                low, high = self._extents(name, profile)
                if len(low) != len(shape) or not all(
                    least <= side <= most for least, side, most in zip(low, shape, high, strict=True)
                ):
                    outside.append(name)
                    ranges[name] = f"{name} {shape}, built for {low} to {high}"
            if not outside:
                return profile
        raise BundleError(
            f"program {self._program.name} was not built for {'; '.join(ranges.values())}; "
            "build one that was with build-engines --profile, --batch or --prompt-chunks"
        )

    def _extents(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest shape of an input."""
        fixed = tuple(self._engine.get_tensor_shape(name))
        if -1 not in fixed:
            return fixed, fixed
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)


class TensorRtLaunch:
    """See ``EngineLaunch``. Calls with the same shapes take turns on one context, which has the last one's addresses.

    Args:
        context: for the shapes of this launch.
        addresses: of every tensor.
        stream: handle of the stream that it goes to.
        failed: what to raise where it does not start.
    """

    def __init__(
        self, context: _Context, addresses: Mapping[str, int], stream: int, failed: Callable[[], BundleError]
    ) -> None:
        self.scratch_bytes = context.scratch_bytes
        self._context, self._addresses, self._stream, self._failed = context, addresses, stream, failed
        self._scratch = 0

    def use_scratch(self, address: int) -> None:
        """See ``EngineLaunch``; the address is a multiple of 256."""
        self._scratch = address

    def __call__(self) -> None:
        """See ``EngineLaunch``."""
        self._context.bind(self._addresses, self._scratch)
        if not self._context.handle.execute_async_v3(self._stream):
            raise self._failed()


class _Context:
    """An execution context with the addresses that it holds."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.scratch_bytes = int(handle.update_device_memory_size_for_shapes())
        self._bound: dict[str, int] = {}
        self._scratch = 0

    def bind(self, addresses: Mapping[str, int], scratch: int) -> None:
        """Lets the next launch read, write and work there."""
        if self.scratch_bytes and scratch != self._scratch:
            self.handle.set_device_memory(scratch, self.scratch_bytes)
            self._scratch = scratch
        for name, address in addresses.items():
            if self._bound.get(name) != address:
                if not self.handle.set_tensor_address(name, address):
                    raise BundleError(f"TensorRT does not take address {address:#x} for {name}")
                self._bound[name] = address


def _logger(module: Any, messages: list[str]) -> Any:
    """Collects errors in ``messages``; warnings go to Python's log."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR):
                messages.append(message.strip())
            elif severity == module.ILogger.Severity.WARNING:
                _log.info("TensorRT: %s", message.strip())

    return Logger()
