"""Which layers are brought to int8, before anything is measured."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable

from controlrt.compiler.quantization.statistics import Statistics
from controlrt.compiler.quantization.thresholds import amax_of
from controlrt.engines.int8.options import Int8Options
from controlrt.runtime.errors import BuildError, UserError
from controlrt.runtime.manifest import Manifest, QuantizedLayer

KEPT = {
    "*conv_in": "it reads the latents themselves",
    "*conv_out": "it makes the latents themselves",
    "*conv_shortcut": "it carries the picture past the block",
    "*controlnet_cond_embedding*": "it runs once per control picture",
    "*time_emb*": "it runs once per schedule",
}
"""Patterns of names of layers that stay as they are, and why; docs/int8.md has what each is worth."""


def choose_layers(statistics: Statistics, options: Int8Options) -> tuple[QuantizedLayer, ...]:
    """All layers that there are statistics of, and which of them are to be in int8.

    Raises:
        UserError: a pattern of ``keep`` that no layer has.
        BuildError: no layer is left.
    """
    reasons = {**KEPT, **{pattern: f"--keep {pattern}" for pattern in options.keep}}
    names = [f"{part}:{name}" for part, layers in statistics.layers.items() for name in layers]
    for pattern in options.keep:
        if not fnmatch.filter(names, f"*{pattern}*"):
            raise UserError(f"--keep {pattern!r}: no layer is called so; controlrt calibrate show lists them")
    found = []
    for part, layers in statistics.layers.items():
        for name, layer in layers.items():
            amax = amax_of(layer, options.method)
            kept = next((why for pattern, why in reasons.items() if _matches(name, pattern, options)), None)
            if kept is None and amax == 0:
                kept = "all that it reads is 0"
            found.append(QuantizedLayer(part=part, name=name, amax=amax, kept=kept))
    if all(layer.kept for layer in found):
        raise BuildError("no layer is left for int8; leave out --keep, or build with another --precision")
    return tuple(found)


def amax_by_part(layers: Iterable[QuantizedLayer]) -> dict[str, dict[str, float]]:
    """The threshold of every layer that is in int8, by part and name."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for layer in layers:
        if layer.kept is None:
            found[layer.part][layer.name] = layer.amax
    return found


def check_statistics(statistics: Statistics, exported: Manifest) -> None:
    """Refuses statistics of other weights.

    Raises:
        UserError: they were taken of another checkpoint, or lack one that is built.
    """
    known = set(statistics.about.sources.values())
    for source, digest in exported.provenance.sources.items():
        if digest not in known:
            raise UserError(
                f"the statistics are of other weights than {source}; take them of these with: controlrt calibrate"
            )


def _matches(name: str, pattern: str, options: Int8Options) -> bool:
    return fnmatch.fnmatch(name, f"*{pattern}*" if pattern in options.keep else pattern)
