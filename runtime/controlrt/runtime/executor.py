"""Runs programs and plans with ONNX Runtime on the CPU, on preallocated buffers bound once per plan."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BundleError
from controlrt.runtime.plan import Plan, View

if TYPE_CHECKING:
    import onnxruntime as ort


class OnnxRuntimeExecutor:
    """Owns one session per program of a bundle; sessions open on first use."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self._bundle, self._threads = bundle, threads
        self._sessions: dict[str, ort.InferenceSession] = {}

    def session(self, program: str) -> ort.InferenceSession:
        """The session of ``program``."""
        if program not in self._sessions:
            file = self._bundle.file(self._bundle.manifest.program(program).file)
            self._sessions[program] = open_session(file, self._threads)
        return self._sessions[program]

    def run(self, program: str, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Runs one program once on NumPy arrays and returns its outputs in order."""
        return list(self.session(program).run(None, inputs))

    def bind(self, plan: Plan) -> BoundPlan:
        """Allocates the plan's buffers, zeroed, and binds every call to them."""
        return BoundPlan(self, plan)

    def close(self) -> None:
        """Releases the sessions."""
        self._sessions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BoundPlan:
    """A plan with memory behind it. Write inputs into ``buffers``, run the steps, read ``buffers[plan.result]``."""

    def __init__(self, executor: OnnxRuntimeExecutor, plan: Plan) -> None:
        self.plan = plan
        self.buffers = {name: np.zeros(shape, dtype) for name, (shape, dtype) in plan.buffers.items()}
        self._steps = []
        for calls in plan.steps:
            bound = []
            for call in calls:
                session = executor.session(call.program)
                binding = session.io_binding()
                for bind, views in ((binding.bind_input, call.inputs), (binding.bind_output, call.outputs)):
                    for name, view in views.items():
                        array = self._array(view)
                        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
                bound.append((session, binding))
            self._steps.append(bound)

    def run_step(self, step: int) -> None:
        """Runs the calls of one step."""
        for session, binding in self._steps[step]:
            session.run_with_iobinding(binding)

    def _array(self, view: View) -> NDArray[Any]:
        buffer = self.buffers[view.buffer]
        return buffer if view.step is None else buffer[view.step]


def open_session(file: Path, threads: int | None = None) -> ort.InferenceSession:
    """Opens an ONNX file on the CPU provider.

    Raises:
        BundleError: ONNX Runtime refuses the file.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # the threads of one session must not spin on the cores that the next one needs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {file}: {error}") from error
