"""Runs programs with ONNX Runtime on the CPU, bound to memory once per plan."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BundleError
from controlrt.runtime.executors.base import Arrays, HostExecutor, Launch

if TYPE_CHECKING:
    import onnxruntime as ort


IDENTITY = (
    b'\x08\t:K\n!\n\x01x\x12\x01y\x1a\x0fnode_Identity_0"\x08Identity\x12\x04idleZ\x0f\n\x01x\x12\n\n\x08\x08\x01'
    b"\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x12"
)
"""An ONNX file: y = Identity(x), both of one float."""


class OnnxRuntimeExecutor(HostExecutor):
    """One session per program."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle, threads)
        self._sessions: dict[str, ort.InferenceSession] = {}

    def load(self, program: str) -> None:
        """See ``HostExecutor``."""
        self._session(program)

    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See ``HostExecutor``."""
        session = self._session(program)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def bind_call(self, program: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """See ``HostExecutor``."""
        session = self._session(program)
        binding = session.io_binding()
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return partial(session.run_with_iobinding, binding)

    def release_scratch(self) -> None:
        """See ``Executor``; of all executors of this process, which share one arena."""
        import onnxruntime as ort

        asked = ort.RunOptions()
        asked.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        _idle().run(None, {"x": np.zeros(1, np.float32)}, asked)

    def close(self) -> None:
        """See ``HostExecutor``."""
        self._sessions.clear()

    def _session(self, program: str) -> ort.InferenceSession:
        if program not in self._sessions:
            self._sessions[program] = self._open(program)
        return self._sessions[program]

    def _open(self, program: str) -> ort.InferenceSession:
        """Opens the file of ``program``."""
        return open_session(self._bundle.file(self._bundle.manifest.program(program).file), self._threads)


def open_session(
    file: Path, threads: int | None = None, model: bytes | None = None, *, packed: bool = True
) -> ort.InferenceSession:
    """Opens an ONNX file on the CPU provider.

    Args:
        file: the file, its weights beside it.
        threads: CPU threads; all cores by default.
        model: what is opened in place of the contents of ``file``, with the same weights.
        packed: lay weights of matrix products out as kernels read them best, which copies them; else they stay in the
            file, mapped, and what runs once is there sooner.

    Raises:
        BundleError: ONNX Runtime refuses the file.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.use_env_allocators", "1")
    # weights go with their session, and not into the memory that all share
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_mem_pattern = False  # a session's own block for all that its second run needs
    options.log_severity_level = 3
    # the threads of one session must not spin on the cores that the next one needs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if model is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    try:
        _share_memory()
        return ort.InferenceSession(model or file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {file}: {error}") from error


@cache
def _idle() -> ort.InferenceSession:
    """A session that shares the arena and computes nothing."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1")
    _share_memory()
    return ort.InferenceSession(IDENTITY, options, providers=["CPUExecutionProvider"])


@cache
def _share_memory() -> None:
    """Has all sessions of this process take what they need while they run from one arena, which grows by what is asked
    for. Each would have its own, which grows to powers of two; and programs run one after another.

    The arena stays with the process, for sessions opened later, and takes the place of one that an application has
    registered for its own.
    """
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
