"""The sizes of a program's tensors, from those of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controlrt.runtime.errors import BundleError
from controlrt.runtime.manifest import TensorSpec

Dimensions = Mapping[str, int]


def dimensions_of(specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What each named dimension is in a call.

    Args:
        specs: of the inputs.
        shapes: of what is given, by input name.

    Raises:
        BundleError: an input is missing, or its shape does not fit.
    """
    found: dict[str, int] = {}
    for spec in specs:
        shape = shapes.get(spec.name)
        if shape is None or len(shape) != len(spec.shape):
            raise BundleError(f"input {spec.name} has shape {shape}, but the program takes {spec.shape}")
        for dim, size in zip(spec.shape, shape, strict=True):
            if isinstance(dim, int):
                if dim != size:
                    raise BundleError(f"input {spec.name} has shape {shape}, but the program takes {spec.shape}")
                continue
            name, divisor = _parsed(dim)
            if found.setdefault(name, size * divisor) // divisor != size:
                raise BundleError(f"input {spec.name} has {size} for {dim}, another input {found[name] // divisor}")
    return found


def shape_of(spec: TensorSpec, dims: Dimensions) -> tuple[int, ...]:
    """The shape of a tensor where named dimensions are ``dims``; ``height/8`` is an eighth of ``height``."""
    return tuple(dim if isinstance(dim, int) else dims[_parsed(dim)[0]] // _parsed(dim)[1] for dim in spec.shape)


def _parsed(dim: str) -> tuple[str, int]:
    """``height/8`` is ``height`` and 8."""
    name, _, divisor = dim.partition("/")
    return name, int(divisor or 1)
