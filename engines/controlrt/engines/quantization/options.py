"""What a build in int8 or fp8 can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from controlrt.compiler.quantization.arithmetic import FORMATS, NumberFormat
from controlrt.compiler.quantization.thresholds import DEFAULT_METHODS, methods_of
from controlrt.runtime.errors import ParameterError, UserError
from controlrt.runtime.manifest import Precision, QuantizedPrecision

MIN_PSNR_DB = 28.0
SMOOTHING = 0.5


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """What layers are quantized by."""

    precision: QuantizedPrecision = "int8"
    """What they are brought to."""
    statistics: Path
    """A file of ``controlrt calibrate``."""
    method: str | None = None
    """How the largest magnitude that an input keeps is found; None for the precision's default. See ``amax_method``."""
    keep: tuple[str, ...] = ()
    """Patterns of layers that stay as they are, beside ``layer_choice.KEPT``."""
    budget: float | None = None
    """The error of the final latents that is not to be passed, relative to theirs; blocks are measured for it."""
    smoothing: float | None = SMOOTHING
    """How much of the outliers of channels is moved into weights, from 0 to 1; None for nothing. See ``smoothing``."""
    reduce_range: bool | None = None
    """Whether weights in int8 take 7 bits of the 8, for CPUs that add in 16 bits; None for what this machine needs."""
    unquantized: Precision | None = None
    """What all else is computed in; None for what suits this machine. See ``Backend.unquantized_precisions``."""
    min_psnr_db: float = MIN_PSNR_DB
    """Of the pictures that float32 drew, on average."""

    def __post_init__(self) -> None:
        methods = methods_of(self.number_format)
        if self.method is not None and self.method not in methods:
            allowed = f"one of {', '.join(methods)} with --precision {self.precision}"
            raise ParameterError("--amax", self.method, allowed)
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget > 0):
            raise ParameterError("--quality-budget", self.budget, "a number above 0, such as 0.05")
        if self.smoothing is not None and not 0 <= self.smoothing <= 1:
            raise ParameterError("--smooth", self.smoothing, "a number from 0 to 1, such as 0.5")
        if not (math.isfinite(self.min_psnr_db) and self.min_psnr_db >= 0):
            raise ParameterError("--min-psnr", self.min_psnr_db, "a number of decibels, such as 28")
        if self.precision == "fp8":
            self._check_fp8()

    def _check_fp8(self) -> None:
        if self.reduce_range:
            raise UserError(
                "--reduce-range is for int8, whose products can overflow 16 bits; drop it, or build in int8"
            )
        if self.budget is not None:
            allowed = "left out with --precision fp8: blocks are timed on CPUs, and none computes in it"
            raise ParameterError("--quality-budget", self.budget, f"{allowed}; choose layers with --keep")

    @property
    def number_format(self) -> NumberFormat:
        """The numbers of the precision."""
        return FORMATS[self.precision]

    @property
    def amax_method(self) -> str:
        """How the largest magnitude that an input keeps is found; see ``thresholds.amax_of``."""
        return self.method or DEFAULT_METHODS[self.precision]
