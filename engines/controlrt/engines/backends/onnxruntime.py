"""ONNX Runtime on the CPU: programs stay ONNX; each is loaded once to see that it can be."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from controlrt.runtime.errors import BuildError, BundleError
from controlrt.runtime.executor import open_session
from controlrt.runtime.manifest import Program


class OnnxRuntimeBackend:
    """See ``Backend``."""

    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version."""
        return {"onnxruntime": importlib.metadata.version("onnxruntime")}

    def compile(self, program: Program, source: Path, target: Path) -> Program:
        """Copies the ONNX file with its weights and opens it.

        Raises:
            BuildError: ONNX Runtime refuses the program.
        """
        file = target / program.file
        file.parent.mkdir(parents=True, exist_ok=True)
        for part in (source / program.file).parent.glob(f"{Path(program.file).name}*"):
            shutil.copyfile(part, file.parent / part.name)
        try:
            session = open_session(file)
        except BundleError as error:
            raise BuildError(f"program {program.name}: {error}") from error
        expected = {tensor.name for tensor in program.inputs}
        found = {tensor.name for tensor in session.get_inputs()}
        if found != expected:
            raise BuildError(f"program {program.name}: inputs are {sorted(found)}, the export says {sorted(expected)}")
        return program
