"""Which layers are brought to int8 or fp8, before anything is measured."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from controlrt.compiler.compile import FUSED, UNET
from controlrt.compiler.fuse import fused_name
from controlrt.compiler.quantization.statistics import Case, Statistics, weights_of
from controlrt.compiler.quantization.thresholds import amax_of
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.runtime.errors import BuildError, ControlRTError, UserError
from controlrt.runtime.manifest import Manifest, QuantizedLayer
from controlrt.runtime.profile import ShapeProfile

T = TypeVar("T")
KEPT = {
    ".conv_in": "it reads the latents themselves",
    ".conv_out": "it makes the latents themselves",
    ".conv_shortcut": "it carries the picture past the block",
}
"""Patterns of names of layers that stay as they are, and why."""


def choose_layers(statistics: Statistics, options: QuantizationOptions) -> tuple[QuantizedLayer, ...]:
    """All layers that there are statistics of, and which of them are to be in 8 bits.

    Raises:
        UserError: a pattern of ``keep`` that no layer has.
        BuildError: no layer is left.
    """
    reasons = {**KEPT, **{pattern: f"--keep {pattern}" for pattern in options.keep}}
    names = [f"{part}:{name}" for part, layers in statistics.layers.items() for name in layers]
    for pattern in options.keep:
        if not any(_matches(name, pattern) for name in names):
            raise UserError(f"--keep {pattern!r}: no layer is called so; controlrt calibrate show lists them")
    found = []
    for part, layers in statistics.layers.items():
        for name, layer in layers.items():
            amax = amax_of(layer, options.amax_method, options.number_format)
            kept = next((why for pattern, why in reasons.items() if _matches(f"{part}:{name}", pattern)), None)
            if kept is None and amax == 0:
                kept = "all that it reads is 0"
            found.append(QuantizedLayer(part=part, name=name, amax=amax, kept=kept))
    if all(layer.kept for layer in found):
        raise BuildError(
            f"no layer is left for {options.precision}; leave out --keep, or build with another --precision"
        )
    return tuple(found)


def amax_by_part(layers: Iterable[QuantizedLayer]) -> dict[str, dict[str, float]]:
    """The threshold of every layer that is in 8 bits, by part and name."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for layer in layers:
        if layer.kept is None:
            found[layer.part][layer.name] = layer.amax
    return found


def in_part(by_part: Mapping[str, Mapping[str, T]], part: str, fused: Mapping[str, str]) -> dict[str, T]:
    """What is known of the layers of one part, by the names that they have in its graph.

    Args:
        by_part: by part, and by the names that layers have there.
        part: whose; the fused one has the layers of the UNet and of its ControlNets.
        fused: the parts of the ControlNets in the fused one, by control.
    """
    if part != FUSED:
        return dict(by_part.get(part, {}))
    found = dict(by_part.get(UNET, {}))
    for control, own in fused.items():
        found |= {fused_name(control, name): each for name, each in by_part.get(own, {}).items()}
    return found


def fitting(statistics: Statistics, exported: Manifest, profile: ShapeProfile) -> Statistics:
    """What of the statistics a build can use: of the parts that it has, and unseen cases that it can draw.

    Raises:
        UserError: they were taken of other weights, or lack a part, or hold no case that the build could draw.
    """
    parts = weights_of(exported)
    for program in exported.programs:
        part = program.part
        if part not in parts or not any(spec.name == "timestep" for spec in program.inputs):
            continue
        if part not in statistics.layers:
            raise UserError(f"the statistics say nothing of {part}; take them with it by: controlrt calibrate")
        if statistics.about.parts.get(part) != parts[part]:
            raise UserError(
                f"the statistics are of other weights than those of {part}; take them of these with: "
                "controlrt calibrate"
            )
    names = {name for control in exported.controls for name in control.names}
    cases = tuple(case for case in statistics.unseen if names.issuperset(case.hints) and _draws(profile, case))
    if not cases:
        raise UserError(
            f"the statistics hold no unseen picture that a bundle of {profile}, batch {profile.batch}, can draw to be "
            "compared by; take them with the same --profile, --batch and controls: controlrt calibrate --unseen 4"
        )
    layers = {part: found for part, found in statistics.layers.items() if part in parts}
    return replace(statistics, layers=layers, unseen=cases)


def _draws(profile: ShapeProfile, case: Case) -> bool:
    given = case.arguments
    try:
        profile.check(given["width"], given["height"], given.get("num_images_per_prompt", 1))
    except ControlRTError:
        return False
    return True


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, f"*{pattern}*")
