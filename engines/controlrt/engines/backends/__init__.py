"""Backends: which compiler passes one takes, and what it makes of the ONNX that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from controlrt.compiler.compile import Passes
from controlrt.compiler.passes.quantize import Inputs
from controlrt.engines.backends.cuda import CudaBackend
from controlrt.engines.backends.onnxruntime import OnnxRuntimeBackend
from controlrt.engines.backends.openvino import OpenVinoBackend
from controlrt.engines.backends.tensorrt import TensorRtBackend
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.runtime.cuda.onnxruntime import INSTALL
from controlrt.runtime.errors import UserError
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.manifest import Precision, Program
from controlrt.runtime.profile import ShapeProfile

Device = Literal["cpu", "cuda"]


class Backend(Protocol):
    """What the build asks of a backend."""

    passes: Passes
    """Compiler passes that help it, in order; docs/passes.md has the measurements."""
    precisions: tuple[Precision, ...]
    """What it computes in, the exact one first."""
    default_precision: Precision
    """What it computes in where nobody says."""
    int8_inputs: Inputs | None
    """What layers in int8 read; None where weights alone are in int8."""
    ships_onnx: bool
    """Whether programs stay ONNX in the bundle; if not, they become engines, and are measured before that as ONNX."""

    @property
    def device(self) -> Device:
        """What runs its programs."""

    def is_installed(self) -> bool:
        """Whether it can build here."""

    def runs_here(self) -> bool:
        """Whether what it builds can run here too."""

    def versions(self) -> dict[str, str]:
        """Versions of everything that decides what it makes."""

    def unquantized_precisions(self) -> tuple[Precision, ...]:
        """What all else can be computed in beside layers in 8 bits; the first is what suits this machine."""

    def check_options(self, options: EngineOptions) -> None:
        """Called before any work is done.

        Raises:
            UserError: it or this machine cannot do what is asked.
        """

    def finish(
        self, program: Program, file: Path, target: Path, profile: ShapeProfile, options: EngineOptions
    ) -> Program:
        """Makes of a compiled program what the bundle ships.

        Args:
            program: its manifest entry.
            file: its ONNX file, weights beside it.
            target: the bundle's directory, in which ``file`` lies where ``ships_onnx``.
            profile: what sizes it must run at.
            options: of engines.

        Returns:
            The manifest entry of what is shipped.

        Raises:
            BuildError: the backend refuses it.
        """


BACKENDS: dict[BackendName, Backend] = {
    "tensorrt": TensorRtBackend("tensorrt"),
    "cuda": CudaBackend(),
    "tensorrt-rtx": TensorRtBackend("tensorrt-rtx"),
    "openvino": OpenVinoBackend(),
    "onnxruntime": OnnxRuntimeBackend(),
}
"""Backends by the name that --backend takes, the fastest first."""


def choose_backend(name: str | None) -> BackendName:
    """The backend called ``name``, or the fastest one that runs here.

    Raises:
        UserError: it is not installed.
    """
    for known, backend in BACKENDS.items():
        if name == known and not backend.is_installed():
            how = INSTALL if name == "cuda" else f"pip install 'controlrt[{name}]'"
            raise UserError(f"backend {name} is not installed here; install it with: {how}")
        if name == known or (name is None and backend.runs_here()):
            return known
    raise UserError(f"no backend {name!r}; there are: {', '.join(BACKENDS)}")
