"""One page of HTML of statistics: ``controlrt calibrate show``."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from controlrt.calibration.figures import layer_figure, overview
from controlrt.compiler.quantization.statistics import LayerStatistics, Statistics
from controlrt.compiler.quantization.thresholds import METHODS, amax_of
from controlrt.runtime.page.frame import frame
from controlrt.runtime.page.markup import NOTHING, Section, fact_list, figure, heading, paragraph, table
from controlrt.runtime.page.svg import number
from controlrt.runtime.storage import atomic_file

_OTHERS = tuple(method for method in METHODS if method != "minmax")


def write(statistics: Statistics, file: Path) -> None:
    """Writes the page, whole or not at all; folders on the way are made."""
    text = document(statistics)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def document(statistics: Statistics) -> str:
    """The page. Names are escaped, and nothing in it points outside."""
    about = statistics.about
    parts = [_part(number, *each) for number, each in enumerate(statistics.layers.items())]
    layers = sum(map(len, statistics.layers.values()))
    drawn = f"{about.cases} cases, {about.steps} steps, {about.size[0]}×{about.size[1]}"
    top = (
        f'<header><p class="kicker">controlrt calibrate · {html.escape(about.data)} · {drawn}</p>'
        f"<h1>What {layers} layers were seen to read</h1></header>"
    )
    return frame(f"controlrt calibrate: {about.data}", top, [*parts, _origin(statistics)])


def drift(layer: LayerStatistics) -> float | None:
    """The largest magnitude at the loudest timesteps over that at the quietest; None where all were 0."""
    seen = layer.bucket_amax[layer.bucket_amax > 0]
    return float(seen.max() / seen.min()) if seen.size else None


def spread(layer: LayerStatistics) -> float | None:
    """The largest magnitude of all channels over the median channel's; None where that is 0."""
    median = float(np.median(layer.channel_amax))
    return layer.amax / median if median else None


def _part(place: int, part: str, layers: Mapping[str, LayerStatistics]) -> Section:
    thresholds = {name: {method: amax_of(layer, method) for method in METHODS} for name, layer in layers.items()}
    anchors = [f"layer-{place}-{index}" for index in range(len(layers))]
    rows = [
        (
            name,
            str(layer.channel_amax.size),
            _shown(layer.amax),
            *(_shown(thresholds[name][method]) for method in _OTHERS),
            _shown(drift(layer)),
            _shown(spread(layer)),
        )
        for name, layer in layers.items()
    ]
    text = (
        "A threshold is the magnitude that becomes 127 in int8; there is a column for each method. Drift is the "
        "largest magnitude at the loudest tenth of the timesteps over that at the quietest, spread that of all "
        "channels over the median channel's."
    )
    head = ("layer", "channels", "largest", *_OTHERS, "drift", "spread")
    pictures = "".join(
        f"<details><summary>{html.escape(name)}</summary>"
        f'<div id="{anchor}">{figure(layer_figure(name, layer, thresholds[name]))}</div></details>'
        for anchor, (name, layer) in zip(anchors, layers.items(), strict=True)
    )
    markup = (
        paragraph(text)
        + figure(overview(f"Layers of {part}", layers, thresholds))
        + table(f"{part}: magnitudes and thresholds", head, rows, anchors)
        + heading("Every layer")
        + pictures
    )
    return Section(name=f"part-{place}", heading=part, markup=markup)


def _origin(statistics: Statistics) -> Section:
    about = statistics.about
    facts = [
        ("calibration set", about.data),
        ("cases", f"{about.cases}, and {len(statistics.unseen)} more that no statistics are of"),
        ("steps", str(about.steps)),
        ("samplers", ", ".join(about.samplers)),
        ("guidance scales", ", ".join(f"{scale:g}" for scale in about.guidance_scales)),
        ("size", f"{about.size[0]}×{about.size[1]}"),
        ("seed", str(about.seed)),
        *((f"SHA-256 of {name}", digest) for name, digest in about.parts.items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in about.versions.items())),
    ]
    return Section(name="origin", heading="Where they come from", markup=fact_list(facts))


def _shown(value: float | None) -> str:
    return NOTHING if value is None else number(float(f"{value:.4g}"))
