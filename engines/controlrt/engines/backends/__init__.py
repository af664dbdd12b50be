"""Backends: which compiler passes one takes, and whether it runs what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from controlrt.compiler.compile import Passes
from controlrt.engines.backends.cuda import CudaBackend
from controlrt.engines.backends.onnxruntime import OnnxRuntimeBackend
from controlrt.engines.backends.openvino import OpenVinoBackend
from controlrt.runtime.errors import UserError
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.manifest import Precision, Program

Device = Literal["cpu", "cuda"]


class Backend(Protocol):
    """What the build asks of a backend."""

    passes: Passes
    """Compiler passes that help it, in order; docs/passes.md has the measurements."""
    precisions: tuple[Precision, ...]
    """What it computes in, the exact one first."""

    @property
    def device(self) -> Device:
        """What runs its programs."""

    def is_installed(self) -> bool:
        """Whether it can be used here."""

    def versions(self) -> dict[str, str]:
        """Versions of everything that decides what it makes."""

    def check(self, program: Program, file: Path) -> None:
        """Opens a compiled program.

        Raises:
            BuildError: the backend refuses it.
        """


BACKENDS: dict[BackendName, Backend] = {
    "cuda": CudaBackend(),
    "openvino": OpenVinoBackend(),
    "onnxruntime": OnnxRuntimeBackend(),
}
"""Backends by the name that --backend takes, the fastest first."""


def choose_backend(name: str | None) -> BackendName:
    """The backend called ``name``, or the fastest one installed.

    Raises:
        UserError: it is not installed.
    """
    for known, backend in BACKENDS.items():
        if name == known and not backend.is_installed():
            raise UserError(f"backend {name} is not installed here; install it with: pip install 'controlrt[{name}]'")
        if name == known or (name is None and backend.is_installed()):
            return known
    raise UserError(f"no backend {name!r}; there are: {', '.join(BACKENDS)}")
