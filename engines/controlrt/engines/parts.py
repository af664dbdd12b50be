"""The parts of an export on their way through the compiler: graphs, precisions, sizes to check them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from controlrt.compiler.compile import ProgramGraph, fuse_programs, load_program, one_picture
from controlrt.runtime.executors.base import DECODER, ENCODER
from controlrt.runtime.image_tokens import image_dimensions
from controlrt.runtime.manifest import Manifest, Precision, QuantizedPrecision

QUANTIZED = get_args(QuantizedPrecision)


def part_graphs(source: Path, exported: Manifest, fuse: Sequence[str]) -> Iterator[ProgramGraph]:
    """Every exported program, and the one that is the UNet and the controls ``fuse``, if there are any."""
    models = {}
    for program in exported.programs:
        model = load_program(program, source, exported.profile)
        models[program.name] = ProgramGraph(program=program, model=model)
        yield models[program.name]
    if fuse:
        fused = [control for control in exported.controls if control.name in fuse]
        yield fuse_programs(models["unet"], {control.name: models[control.part] for control in fused})


def part_precision(part: str, precision: Precision, exported: Manifest) -> Precision:
    """What a part is in, of a bundle in ``precision``: a VAE that leaves float16's range is in float32."""
    overflows = precision == "fp16" and part.startswith("vae") and exported.model.vae_float32
    return "fp32" if overflows else precision


def few_pictures(exported: Manifest, part: str) -> dict[str, int]:
    """Sizes to check with: two guided pictures of the longest prompts, or the nearest number that the profile has; one
    picture for the VAE, which is never run for more."""
    profile = exported.profile.of(part)
    images = image_dimensions(spec for program in exported.programs for spec in program.inputs)
    batch = 1 if part in (DECODER, ENCODER) else min(max(2, profile.batch.low), profile.batch.high)
    return one_picture(profile) | images | {"batch": batch, "rows": 2 * batch, "tokens": profile.tokens.high}


def fused_controls(manifest: Manifest) -> tuple[str, ...]:
    """The controls that a bundle has in one program with the UNet."""
    return manifest.fusion.controls if manifest.fusion is not None else ()
