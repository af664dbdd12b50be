"""What a ControlNet Union can be controlled by: its control types, as they are published."""

from __future__ import annotations

UNION = (
    *(("openpose",), ("depth",), ("hed", "pidi", "scribble", "ted")),
    *(("canny", "lineart", "anime_lineart", "mlsd"), ("normal",), ("segment",)),
)
PROMAX = (*UNION, ("tile",), ("repaint",))
PUBLISHED = {len(UNION): UNION, len(PROMAX): PROMAX}
"""Names of each type, by the number of types: those of xinsir's controlnet-union-sdxl-1.0, and of its ProMax."""


def control_types(count: int) -> dict[str, int]:
    """The number of each control type by its names; by the number itself for a model of another number of types."""
    names = PUBLISHED.get(count) or [(str(number),) for number in range(count)]
    return {name: number for number, own in enumerate(names) for name in own}
