"""TensorRT's optimization profiles from a ``ShapeProfile``: what each named dimension may be, and is tuned for.

A program gets one optimization profile for each size of the ``ShapeProfile``. Where the batch is fixed, a step has two
of them for each size, guided and not, so that its rows are no range either: kernels are chosen for what will run.
"""

from __future__ import annotations

from collections.abc import Sequence

from controlrt.engines.tensorrt.request import Shapes
from controlrt.runtime.errors import BuildError
from controlrt.runtime.image_tokens import image_dimensions
from controlrt.runtime.manifest import Program, TensorSpec
from controlrt.runtime.pipeline import DEFAULT_STEPS
from controlrt.runtime.profile import MAX_IMAGES, Range, ShapeProfile, Size
from controlrt.runtime.samplers import MAX_STEPS

Extent = tuple[int, int, int]
"""Smallest, the one to tune for, largest."""
MAX_EXTRA = 1024
"""Rows of learned words that a text encoder takes; ten textual inversions of the longest kind."""
EVERY_STEP = ("encode", "step")
"""The stages that run in the denoising loop, for all pictures of a call at once."""
CALLS_PER_STEP = 2
"""A sampler of the second order calls the model twice a step."""


def optimization_profiles(program: Program, profile: ShapeProfile) -> list[Shapes]:
    """The shapes of the inputs that vary, one entry for each optimization profile; an empty one where none varies.

    Raises:
        BuildError: a dimension that no profile speaks of.
    """
    named = {dim for spec in program.inputs for dim in spec.shape if isinstance(dim, str)}
    found: list[Shapes] = []
    for size in profile.sizes:
        for rows in _rows(program, profile):
            extents = _extents(program, size, rows, profile)
            unknown = sorted(named - extents.keys())
            if unknown:
                raise BuildError(f"program {program.name}: nothing says how large {', '.join(unknown)} may be")
            shapes = {spec.name: _shapes(spec, extents) for spec in program.inputs if _varies(spec)}
            if shapes not in found:
                found.append(shapes)
    return found


def _rows(program: Program, profile: ShapeProfile) -> Sequence[Extent]:
    low, high = profile.batch.low, profile.batch.high
    if low == high and program.stage in EVERY_STEP:
        return (2 * low,) * 3, (low,) * 3
    return ((low, 2 * low, 2 * high),)


def _extents(program: Program, size: Size, rows: Extent, profile: ShapeProfile) -> dict[str, Extent]:
    """What the manifest's dimensions may be. Everything but a step is run for one picture or prompt at a time."""
    batch = profile.batch
    entries = (1, DEFAULT_STEPS, CALLS_PER_STEP * MAX_STEPS)
    extents = {
        "rows": rows,
        "batch": (batch.low, batch.low, batch.high) if program.stage in EVERY_STEP else (1, 1, 1),
        "steps": entries,
        "entries": entries,
        "prompts": (1, 1, 1),
        "extra": (1, 1, MAX_EXTRA),
        "tokens": (profile.tokens.low, profile.tokens.low, profile.tokens.high),
    }
    extents |= {name: (one, one, one * MAX_IMAGES) for name, one in image_dimensions(program.inputs).items()}
    for side, extent in (("width", size.width), ("height", size.height)):
        extents |= {f"{side}/{2**power}": _scaled(extent, 2**power) for power in range(7)}
        extents[side] = _scaled(extent, 1)
    return extents


def _scaled(side: Range, factor: int) -> Extent:
    return side.low // factor, side.high // factor, side.high // factor


def _varies(spec: TensorSpec) -> bool:
    return any(isinstance(dim, str) for dim in spec.shape)


def _shapes(spec: TensorSpec, extents: dict[str, Extent]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    low, best, high = (
        tuple(dim if isinstance(dim, int) else extents[dim][end] for dim in spec.shape) for end in range(3)
    )
    return low, best, high
