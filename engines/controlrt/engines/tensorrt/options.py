"""What a TensorRT build may be asked for beyond the program itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from controlrt.runtime.errors import ParameterError, UserError

MAX_OPTIMIZATION_LEVEL = 5
MAX_AUX_STREAMS = 16
OPTIONS = {
    "compute_capabilities": "--compute-capability",
    "optimization_level": "--optimization-level",
    "workspace_mib": "--workspace",
    "aux_streams": "--aux-streams",
    "refittable": "--refittable",
    "strip_weights": "--strip-weights",
    "version_compatible": "--version-compatible",
}
"""Fields of ``EngineOptions`` by what the command line calls them."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of the builder; None leaves one to TensorRT."""

    compute_capabilities: tuple[str, ...] = ()
    """GPUs to build for, as in "8.9"; TensorRT-RTX's default where empty, this machine's GPU with TensorRT."""
    optimization_level: int | None = None
    """How long the builder searches: 0 (the first kernel that works) to 5."""
    workspace_mib: int | None = None
    """Scratch memory that a kernel may ask for, in MiB."""
    aux_streams: int | None = None
    """Streams that one engine may use beside its own."""
    refittable: bool = False
    """Whether weights can be replaced in the finished engine."""
    strip_weights: bool = False
    """Whether the engine is shipped without its weights, to be refitted before it runs."""
    version_compatible: bool = False
    """Whether later versions of TensorRT can run it (those with the same major version)."""

    def __post_init__(self) -> None:
        for capability in self.compute_capabilities:
            if re.fullmatch(r"\d{1,2}\.\d", capability) is None:
                raise ParameterError("--compute-capability", capability, "as in 8.9 or 8.6,8.9,12.0")
        level, streams = self.optimization_level, self.aux_streams
        if level is not None and not 0 <= level <= MAX_OPTIMIZATION_LEVEL:
            raise ParameterError("--optimization-level", level, f"from 0 to {MAX_OPTIMIZATION_LEVEL}")
        if streams is not None and not 0 <= streams <= MAX_AUX_STREAMS:
            raise ParameterError("--aux-streams", streams, f"from 0 to {MAX_AUX_STREAMS}")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ParameterError("--workspace", self.workspace_mib, "a number of MiB from 1 on")

    def given(self) -> list[str]:
        """The options that are not left to the builder, as they are called on the command line."""
        default = EngineOptions()
        return [OPTIONS[each.name] for each in fields(self) if getattr(self, each.name) != getattr(default, each.name)]

    @classmethod
    def parse_capabilities(cls, text: str) -> tuple[str, ...]:
        """``"8.6,8.9"`` as a tuple, each once, in order."""
        named = {part.strip() for part in text.split(",") if part.strip()}
        return tuple(sorted(named, key=lambda each: [int(part) if part.isdigit() else -1 for part in each.split(".")]))


def refuse_engine_options(options: EngineOptions, backend: str) -> None:
    """For a backend whose programs stay ONNX.

    Raises:
        UserError: an option was given.
    """
    if given := options.given():
        raise UserError(f"{', '.join(given)}: {backend} builds no engines; drop it, or name --backend tensorrt-rtx")
