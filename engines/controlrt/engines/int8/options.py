"""What a build in int8 can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from controlrt.compiler.quantization.thresholds import METHODS
from controlrt.runtime.errors import ParameterError

MIN_PSNR_DB = 28.0
SMOOTHING = 0.5


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """What layers are quantized by."""

    statistics: Path
    """A file of ``controlrt calibrate``."""
    method: str = METHODS[0]
    """How the largest magnitude that an input keeps is found; see ``thresholds.amax_of``."""
    keep: tuple[str, ...] = ()
    """Patterns of layers that stay as they are, beside ``layer_choice.KEPT``."""
    budget: float | None = None
    """The error of the final latents that is not to be passed, relative to theirs; blocks are measured for it."""
    smoothing: float | None = SMOOTHING
    """How much of the outliers of channels is moved into weights, from 0 to 1; None for nothing. See ``smoothing``."""
    reduce_range: bool | None = None
    """Whether weights take 7 bits of the 8, for CPUs that add products in 16 bits; None for what this machine needs."""
    min_psnr_db: float = MIN_PSNR_DB
    """Of the pictures that float32 drew, on average."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ParameterError("--amax", self.method, f"one of {', '.join(METHODS)}")
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget > 0):
            raise ParameterError("--quality-budget", self.budget, "a number above 0, such as 0.05")
        if self.smoothing is not None and not 0 <= self.smoothing <= 1:
            raise ParameterError("--smooth", self.smoothing, "a number from 0 to 1, such as 0.5")
        if not (math.isfinite(self.min_psnr_db) and self.min_psnr_db >= 0):
            raise ParameterError("--min-psnr", self.min_psnr_db, "a number of decibels, such as 28")
