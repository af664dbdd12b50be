"""Whether a variant computes what it should: its outputs against another's on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from controlrt.compiler.reference import relative_error
from controlrt.compiler.verify import MAX_RELATIVE_ERROR
from controlrt.perf.variants import REFERENCE, Variant, plain

MAX_RUNTIME_ERROR = 1e-4
"""Of another runtime on the plain graphs, eager PyTorch among them: what the export itself is held to."""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the outputs (next latents, guided model output) are from another variant's."""

    compared_with: str
    max_relative_error: float
    """Largest difference over the largest value, of the worse output."""
    limit: float

    @property
    def is_met(self) -> bool:
        """Whether the error is within its limit."""
        return self.max_relative_error <= self.limit


def compare(variant: Variant, outputs: Callable[[str], Path]) -> Accuracy | None:
    """Compares a variant's outputs with those of its yardstick.

    What the compiler did is judged by the plain export in the same runtime; what runtimes do to it, by the reference.

    Args:
        variant: whose outputs.
        outputs: the file of a variant's outputs, by its name.

    Returns:
        None for the reference itself, and where the yardstick was not measured.
    """
    if variant.name == REFERENCE:
        return None
    yardstick = REFERENCE if variant.backend is None or variant.is_plain else plain(variant.backend)
    if not outputs(yardstick).exists():
        return None
    with np.load(outputs(variant.name)) as found, np.load(outputs(yardstick)) as expected:
        error = max(relative_error(found[name], expected[name]) for name in expected)
    limit = MAX_RUNTIME_ERROR if variant.backend is None or variant.is_plain else MAX_RELATIVE_ERROR
    return Accuracy(compared_with=yardstick, max_relative_error=error, limit=limit)
