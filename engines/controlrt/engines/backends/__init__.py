"""Backends: how one exported ONNX program becomes something a runtime executor loads."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from controlrt.engines.backends.onnxruntime import OnnxRuntimeBackend
from controlrt.runtime.manifest import Program


class Backend(Protocol):
    """What the build asks of a backend."""

    def versions(self) -> dict[str, str]:
        """Versions of everything that decides what ``compile`` makes."""

    def compile(self, program: Program, source: Path, target: Path) -> Program:
        """Compiles ``source/program.file`` into the bundle at ``target`` and returns its manifest entry.

        Raises:
            BuildError: the backend refuses the program.
        """


BACKENDS: dict[str, Backend] = {"onnxruntime": OnnxRuntimeBackend()}
"""Backends by the name that --backend takes."""
