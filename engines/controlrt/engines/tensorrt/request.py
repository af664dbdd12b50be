"""What is asked of the processes that run TensorRT, and what they answer; all are JSON files."""

from __future__ import annotations

from typing import Literal

import msgspec

from controlrt.engines.tensorrt.options import EngineOptions

Flavour = Literal["tensorrt", "tensorrt-rtx"]
"""The backend's name; also that of the extra which installs it."""
MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Of the inputs that vary, by name: smallest, the one to tune for, largest."""


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One engine to build."""

    flavour: Flavour
    onnx: str
    """Its path, weights beside it; so are the paths below."""
    plan: str
    answer: str
    timing_cache: str | None
    """Read and extended where the builder times kernels."""
    profiles: list[Shapes]
    options: EngineOptions


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output as the builder sees it; -1 is a dimension that varies."""

    name: str
    dtype: str
    """As NumPy calls it; as TensorRT does where NumPy has no such type."""
    shape: tuple[int, ...]
    on_host: bool
    """Whether it must lie in the host's memory, because it decides shapes."""


class BuildAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How it went."""

    version: str
    """Of the builder."""
    seconds: float
    phases: dict[str, float]
    """Seconds of the builder's phases, those that contain others left out."""
    inputs: list[Tensor]
    outputs: list[Tensor]


class RefitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One engine to give other weights."""

    flavour: Flavour
    onnx: str
    """Its path, the new weights beside it; so are the paths below."""
    plan: str
    refitted: str
    """Where the plan with the new weights goes."""
    answer: str
    changed: list[str]
    """Weights that must not stay as they are."""
    version_compatible: bool


class RefitAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How it went."""

    seconds: float
    refittable: bool
    """Whether the new plan can be refitted too."""
