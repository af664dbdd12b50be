"""One page of HTML of what a bundle has in int8 or fp8: ``controlrt inspect BUNDLE --quantization --html FILE``."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence

from controlrt.runtime.inspection.quantization import describe_quantization
from controlrt.runtime.manifest import Manifest, Quality, Quantization, QuantizedBlock, QuantizedLayer
from controlrt.runtime.page.frame import frame
from controlrt.runtime.page.markup import NOTHING, Section, fact_list, figure, heading, paragraph, table
from controlrt.runtime.page.svg import WIDTH, Drawing, linear, logarithmic, number, x_axis, y_axis

LARGEST = {"int8": 127, "fp8": 448}
"""The number that the largest magnitude becomes."""
_LEFT, _TOP, _BOTTOM = 64.0, 8.0, 262.0
_HEIGHT = 310.0


def quantization_document(name: str, manifest: Manifest, found: Quantization) -> str:
    """The page. Names are escaped, and nothing in it points outside.

    Args:
        name: of the bundle.
        manifest: of it.
        found: the manifest's.
    """
    chosen = sum(layer.kept is None for layer in found.layers)
    top = (
        f'<header><p class="kicker">controlrt inspect · {html.escape(name)} · {manifest.backend}</p>'
        f"<h1>{chosen} of {len(found.layers)} layers in {found.precision}, {found.quality.psnr_db:.1f} dB from "
        f"float32</h1></header>"
    )
    parts = list(dict.fromkeys(layer.part for layer in found.layers))
    layers = [
        _layers(
            place,
            part,
            found.precision,
            [layer for layer in found.layers if layer.part == part],
            inputs=manifest.backend != "tensorrt-rtx" or found.precision != "int8",
        )
        for place, part in enumerate(parts)
    ]
    sections = [_quality(found), _blocks(found), *layers, _origin(manifest, found)]
    return frame(f"controlrt inspect: {name} in {found.precision}", top, sections)


def _quality(found: Quantization) -> Section:
    quality = found.quality
    facts = [
        ("pictures", f"{quality.pictures} of prompts and controls that the calibration left out"),
        ("PSNR to float32", f"{quality.psnr_db:.2f} dB on average, {quality.lowest_psnr_db:.2f} dB the worst"),
        ("SSIM to float32", f"{quality.ssim:.4f}"),
        ("error of the final latents", f"{quality.latent_errors[-1]:.2e}, root mean square relative to theirs"),
    ]
    markup = paragraph(describe_quantization(found)) + fact_list(facts) + figure(_steps_figure(quality))
    return Section(name="quality", heading="What it gives up", markup=markup)


def _steps_figure(quality: Quality) -> str:
    """The error of the latents after each step."""
    drawing = Drawing("Error of the latents after each step", WIDTH, _HEIGHT)
    errors = quality.latent_errors
    x, y = linear([len(errors)], _LEFT, WIDTH - 20), linear(errors, _BOTTOM, _TOP)
    ticks = {tick: number(tick) for tick in x.ticks() if tick == int(tick) > 0}
    x_axis(drawing, x, "step", _BOTTOM, _TOP, ticks)
    y_axis(drawing, y, "error of the latents, relative", _LEFT)
    points = " ".join(f"{x(step):.1f},{y(error):.1f}" for step, error in enumerate(errors, 1))
    drawing.add("polyline", points=points, class_="line onnxruntime")
    for step, error in enumerate(errors, 1):
        drawing.add("circle", tip=f"step {step}: {error:.2e}", cx=x(step), cy=y(error), r=4.0, class_="dot onnxruntime")
    return drawing.render()


def _blocks(found: Quantization) -> Section:
    title = "What blocks cost and save"
    if not found.blocks:
        text = "No block was measured by itself; build-engines --quality-budget does that, and chooses among them."
        return Section(name="blocks", heading=title, markup=paragraph(text))
    spent = math.sqrt(sum(block.latent_error**2 for block in found.blocks if block.chosen))
    saved = sum(block.seconds_saved for block in found.blocks if block.chosen)
    budget = NOTHING if found.budget is None else f"{found.budget:g}"
    facts = [
        ("budget", f"{budget}: the root sum of squares of the chosen blocks' errors in the final latents"),
        ("spent", f"{spent:.2e}"),
        ("saved", f"{saved * 1e3:.2f} ms, every program having run once"),
    ]
    rows = [
        (
            block.name,
            block.part,
            f"{block.latent_error:.2e}",
            f"{block.seconds_saved * 1e3:+.2f} ms",
            found.precision if block.kept is None else "as it was",
            (block.kept or "it saves the most time for its error", "words"),
        )
        for block in found.blocks
    ]
    head = ("block", "of", "error of the final latents", "time saved", "in", "because")
    markup = (
        paragraph(
            "Each block was brought to 8 bits by itself, drew unseen pictures, and was timed in turns with the program "
            "as it was. The time saved is a lower bound, at 98%, of the median."
        )
        + fact_list(facts)
        + figure(_blocks_figure(found.blocks))
        + table(f"Blocks in {found.precision}, one by one", head, rows)
    )
    return Section(name="blocks", heading=title, markup=markup)


def _blocks_figure(blocks: Sequence[QuantizedBlock]) -> str:
    """Error against time saved; blocks without any error have no place."""
    drawing = Drawing("Error against time saved, block by block; those that were chosen are filled", WIDTH, _HEIGHT)
    shown = [block for block in blocks if block.latent_error > 0]
    if not shown:
        return drawing.render()
    x = linear([block.seconds_saved * 1e3 for block in shown], _LEFT, WIDTH - 20)
    y = logarithmic([block.latent_error for block in shown], _BOTTOM, _TOP)
    x_axis(drawing, x, "milliseconds saved", _BOTTOM, _TOP)
    y_axis(drawing, y, "error of the final latents", _LEFT)
    drawing.line(x(0), _TOP, x(0), _BOTTOM, "reference")
    for block in shown:
        kind = "dot gain" if block.chosen else "dot hollow other"
        tip = f"{block.part} {block.name}: {block.latent_error:.2e}, {block.seconds_saved * 1e3:+.2f} ms"
        at = x(block.seconds_saved * 1e3), y(block.latent_error)
        drawing.add("circle", tip=tip, cx=at[0], cy=at[1], r=5.0, class_=kind)
    return drawing.render()


def _layers(place: int, part: str, precision: str, layers: Sequence[QuantizedLayer], *, inputs: bool) -> Section:
    """Every layer of a part; without ``inputs`` their weights alone are quantized."""
    rows = [
        (
            layer.name,
            precision if layer.kept is None else "as it was",
            number(float(f"{layer.amax:.4g}")),
            number(float(f"{layer.amax / LARGEST[precision]:.4g}")) if layer.kept is None and inputs else NOTHING,
            (layer.kept or "", "words"),
        )
        for layer in layers
    ]
    reasons = Counter(layer.kept for layer in layers if layer.kept is not None)
    kept = "; ".join(f"{why} ({count})" for why, count in reasons.items())
    text = (
        f"amax is the largest magnitude that a layer's input keeps, and the scale that over {LARGEST[precision]}. "
        "Layers that read the same value share the largest of their scales; of what was smoothed, amax is the one "
        "before."
    )
    if not inputs:
        text = "Weights alone are quantized on this backend; amax is what the layer's input would keep."
    head = ("layer", "in", "amax", "scale", "because")
    markup = paragraph(text) + (paragraph(f"As they were: {kept}.") if kept else "") + heading("Every layer")
    return Section(name=f"part-{place}", heading=part, markup=markup + table(f"Layers of {part}", head, rows))


def _origin(manifest: Manifest, found: Quantization) -> Section:
    facts = [
        ("command", manifest.provenance.command),
        ("built", manifest.provenance.created),
        ("amax by", found.method),
        ("SmoothQuant", NOTHING if found.smoothing is None else f"{found.smoothing:g} of the outliers into weights"),
        ("weights", "7 bits of the 8" if found.reduced_range else "8 bits"),
        ("SHA-256 of the statistics", found.statistics),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.provenance.versions.items())),
    ]
    return Section(name="origin", heading="Where it comes from", markup=fact_list(facts))
