"""What a bundle has in int8 or fp8, why the rest is not, and what it gives up."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from controlrt.runtime.manifest import Quality, Quantization


def describe_quantization(found: Quantization) -> str:
    """How much is quantized, and how good the pictures are, in a line."""
    layers = sum(layer.kept is None for layer in found.layers)
    bits = ", weights of 7 bits" if found.reduced_range else ""
    smoothed = "" if found.smoothing is None else f", smoothed by {found.smoothing:g}"
    rest = "" if found.unquantized is None else f"all else in {found.unquantized}; "
    quality = found.quality
    return (
        f"{layers} of {len(found.layers)} layers in {found.precision}, by {found.method}{bits}{smoothed}; {rest}"
        f"{quality.pictures} unseen pictures {quality.psnr_db:.1f} dB from float32's, the worst "
        f"{quality.lowest_psnr_db:.1f} dB, SSIM {quality.ssim:.4f}{_scenes(quality)}"
    )


def _scenes(quality: Quality) -> str:
    found = quality.scenes
    if found is None:
        return ""
    return (
        f"; outlines with an IoU of {found.iou:.3f} (float32: {found.float32_iou:.3f}), both colours right in "
        f"{found.colours:.0%} ({found.float32_colours:.0%})"
    )


def quantization_table(found: Quantization) -> list[str]:
    """Lines: what blocks cost and save where they were measured, the error after each step, and what stays and why."""
    lines = [describe_quantization(found), ""]
    if found.blocks:
        budget = f" within {found.budget:g}" if found.budget is not None else ""
        lines.append(f"blocks by themselves, the error of the final latents{budget}:")
        width = max(len(block.name) for block in found.blocks)
        for part, blocks in groupby(found.blocks, key=lambda block: block.part):
            lines.append(f"  {part}")
            for block in blocks:
                saved = f"{block.seconds_saved * 1e3:+8.2f} ms saved"
                chosen = found.precision if block.chosen else ""
                lines.append(f"    {block.name:<{width}}  {block.latent_error:.2e}  {saved}  {chosen}".rstrip())
        lines.append("")
    steps = ", ".join(f"{error:.1e}" for error in found.quality.latent_errors)
    lines += [f"error of the latents after each step: {steps}", "", f"not in {found.precision}:"]
    reasons = Counter((layer.part, layer.kept) for layer in found.layers if layer.kept is not None)
    lines += [f"  {part:<20} {count:4d} layers: {why}" for (part, why), count in sorted(reasons.items())]
    return lines
