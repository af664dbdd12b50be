"""The named dimension that counts the tokens of image prompts.

``images_0*4`` is the number of pictures that the bundle's first IP-Adapter is shown, times the 4 tokens of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from controlrt.runtime.manifest import TensorSpec

_DIMENSION = re.compile(r"images_(\d+)\*(\d+)")


def image_dimension(adapter: int, tokens: int) -> str:
    """The dimension of the bundle's IP-Adapter number ``adapter``, whose pictures have ``tokens`` tokens each."""
    return f"images_{adapter}*{tokens}"


def tokens_of_one(dimension: str | None) -> int | None:
    """How many tokens one picture has; None for a dimension that does not count those of pictures."""
    match = _DIMENSION.fullmatch(dimension or "")
    return int(match[2]) if match else None


def image_dimensions(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Those dimensions of ``specs`` that count tokens of image prompts, and how many one picture has."""
    names = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)}
    return {name: tokens for name in sorted(names) if (tokens := tokens_of_one(name)) is not None}
