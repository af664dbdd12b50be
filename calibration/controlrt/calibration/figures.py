"""What the layers' inputs were seen to be, as pictures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from controlrt.compiler.quantization.statistics import BUCKETS, LayerStatistics
from controlrt.compiler.quantization.thresholds import METHODS, percentile
from controlrt.runtime.page.svg import LINE, WIDTH, Drawing, Scale, linear, logarithmic, number, x_axis, y_axis

_BARS = 128
"""Of a histogram, at most; more bins are drawn together."""
_TOP, _BOTTOM = 8.0, 150.0
_TYPICAL = 99.9
"""Percentile."""


def overview(title: str, layers: Mapping[str, LayerStatistics], thresholds: Mapping[str, Mapping[str, float]]) -> str:
    """The largest magnitude and the first method's threshold of every layer, in a row; layers of zeros have no place.

    Args:
        title: of the picture.
        layers: by name.
        thresholds: of each layer, by method.
    """
    shown = {name: layer.amax for name, layer in layers.items() if thresholds[name][METHODS[0]] > 0}
    drawing = Drawing(title, WIDTH, 310)
    if not shown:
        return drawing.render()
    chosen = [thresholds[name][METHODS[0]] for name in shown]
    x = linear([len(shown)], 64, WIDTH - 20)
    y = logarithmic([*shown.values(), *chosen], 262, _TOP)
    x_axis(drawing, x, "layers, in the order of the table", 262, ticks={0.0: ""})
    y_axis(drawing, y, f"magnitude: from {METHODS[0]} to largest", 64)
    for place, ((name, amax), threshold) in enumerate(zip(shown.items(), chosen, strict=True)):
        at, tip = x(place + 0.5), f"{name}: {METHODS[0]} {_digits(threshold)}, largest {_digits(amax)}"
        drawing.line(at, y(threshold), at, y(amax), "stem other")
        drawing.add("circle", cx=at, cy=y(amax), r=1.5, class_="sample other")
        drawing.add("circle", tip=tip, cx=at, cy=y(threshold), r=2.6, class_="sample onnxruntime")
    return drawing.render()


def layer_figure(title: str, layer: LayerStatistics, thresholds: Mapping[str, float]) -> str:
    """The histogram of a layer's input with thresholds by method, and its magnitudes at each interval of timesteps."""
    drawing = Drawing(title, WIDTH, _BOTTOM + 44)
    _histogram(drawing, layer, thresholds)
    _timesteps(drawing, layer, thresholds[METHODS[0]])
    return drawing.render()


def _histogram(drawing: Drawing, layer: LayerStatistics, thresholds: Mapping[str, float]) -> None:
    counts = layer.histogram.sum(axis=0)
    bars, width = _bars(counts, layer.limit / counts.size)
    x = Scale(low=0, high=max(layer.amax, len(bars) * width) or 1, start=64, end=530)
    y = Scale(low=0.5, high=2.0 * max(int(bars.max(initial=0)), 1), start=_BOTTOM, end=_TOP, is_logarithmic=True)
    x_axis(drawing, x, "magnitude", _BOTTOM, _TOP)
    y_axis(drawing, y, "sampled values", 64, 530)
    steps = "".join(
        f"V{y(count) if count else _BOTTOM:.0f}H{x((place + 1) * width):.1f}" for place, count in enumerate(bars)
    )
    drawing.add("path", d=f"M{x(0):.1f},{_BOTTOM:.0f}{steps}V{_BOTTOM:.0f}Z", class_="bar onnxruntime")
    for line, (method, threshold) in enumerate(thresholds.items()):
        at = x(threshold)
        is_right = at > 400
        drawing.line(at, _TOP, at, _BOTTOM, "reference" if method == METHODS[0] else "leader")
        text = f"{method} {_digits(threshold)}"
        drawing.text(at - 5 if is_right else at + 5, _TOP + LINE * (line + 0.5), text, "end" if is_right else "start")


def _timesteps(drawing: Drawing, layer: LayerStatistics, threshold: float) -> None:
    typical = [percentile(counts, _TYPICAL) * layer.limit / counts.size for counts in layer.histogram]
    x = Scale(low=0, high=1000, start=610, end=WIDTH - 20)
    y = Scale(low=0, high=float(layer.bucket_amax.max()) * 1.05 or 1, start=_BOTTOM, end=_TOP)
    x_axis(drawing, x, f"timestep: largest, {_TYPICAL:g}% (thick), {METHODS[0]} (dashed)", _BOTTOM, _TOP)
    y_axis(drawing, y, "magnitude", 610)
    for bucket, (amax, most) in enumerate(zip(layer.bucket_amax.tolist(), typical, strict=True)):
        if amax > 0:
            at = x((bucket + 0.5) * 1000 / BUCKETS)
            drawing.line(at, _BOTTOM, at, y(min(most, amax)), "interval onnxruntime")
            drawing.line(at, _BOTTOM, at, y(amax), "stem onnxruntime")
            tip = f"largest {_digits(amax)}, {_TYPICAL:g}% {_digits(most)}"
            drawing.add("circle", tip=tip, cx=at, cy=y(amax), r=3.0, class_="dot onnxruntime")
    drawing.line(610, y(threshold), WIDTH - 20, y(threshold), "reference")


def _bars(counts: NDArray[np.int64], width: float) -> tuple[NDArray[np.int64], float]:
    """Bins up to the last that is not empty, joined to few, and how wide each is."""
    filled = int(counts.nonzero()[0].max(initial=0)) + 1
    joined = -(-filled // _BARS)
    padded = np.zeros(-(-filled // joined) * joined, np.int64)
    padded[:filled] = counts[:filled]
    return padded.reshape(-1, joined).sum(axis=1), width * joined


def _digits(value: float) -> str:
    return number(float(f"{value:.3g}"))
