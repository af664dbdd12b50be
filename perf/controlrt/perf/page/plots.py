"""The kinds of plot that the page is made of, each from rows that know nothing of benchmarks.

``kind`` of a row is a class of the page's style sheet and stands for a colour; the rows are labelled, so that nothing
is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from controlrt.runtime.page.svg import (
    CHARACTER,
    LINE,
    WIDTH,
    Drawing,
    Labels,
    linear,
    logarithmic,
    number,
    spread,
    x_axis,
    y_axis,
)

ROW = 34.0
MOST_DOTS = 250
"""Of a row; of more samples, as many are drawn, evenly by rank."""


@dataclass(frozen=True, kw_only=True)
class IntervalRow:
    """A number with its interval, or the reason why there is none."""

    label: str
    kind: str
    value: float | None = None
    low: float = 0
    high: float = 0
    text: str
    """Beside it, or in its place."""
    is_hollow: bool = False
    """For what does not count."""


@dataclass(frozen=True, kw_only=True)
class StripRow:
    """Samples, and some of their percentiles by name."""

    label: str
    kind: str
    samples: tuple[float, ...]
    marks: dict[str, float]
    text: str


@dataclass(frozen=True, kw_only=True)
class StackRow:
    """What a whole is made of, in the order of the parts' names."""

    label: str
    parts: tuple[float, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """A labelled point."""

    label: str
    kind: str
    x: float
    y: float
    is_hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A labelled line of points."""

    label: str
    kind: str
    points: tuple[tuple[float, float], ...]
    dash: int = 0
    """Number of its pattern; lines of one kind differ by it."""


@dataclass(frozen=True, kw_only=True)
class Fall:
    """A bar of a waterfall, from where the one before it ended."""

    label: str
    kind: str
    start: float
    end: float
    text: str


def intervals(title: str, axis: str, rows: Sequence[IntervalRow], reference: float) -> str:
    """One row each, with a line where nothing is gained or lost. Those without a number come last."""
    drawing, left = _rows(title, [row.label for row in rows])
    found = [row for row in rows if row.value is not None]
    scale = linear([reference, *(row.high for row in found)], left, WIDTH - _room(row.text for row in found))
    x_axis(drawing, scale, axis, _bottom(rows))
    drawing.line(scale(reference), 8, scale(reference), _bottom(found), "reference")
    for index, row in enumerate(rows):
        y = _middle(index)
        drawing.text(left - 12, y, row.label, "end")
        if row.value is None:
            drawing.text(left + 8, y, row.text, class_="failed")
            continue
        hollow = " hollow" * row.is_hollow
        x, low, high = (scale(each) for each in (row.value, row.low, row.high))
        drawing.line(scale(0), y, x, y, f"stem {row.kind}")
        drawing.line(low, y, high, y, f"interval {row.kind}{hollow}")
        drawing.add("circle", tip=row.text, cx=x, cy=y, r=6, class_=f"dot {row.kind}{hollow}")
        drawing.text(max(high, x) + 12, y, row.text, class_="failed" if row.is_hollow else "value")
    return drawing.render()


def strips(title: str, axis: str, rows: Sequence[StripRow]) -> str:
    """Every sample as a dot, percentiles as marks, one row each."""
    drawing, left = _rows(title, [row.label for row in rows])
    values = [value for row in rows for value in row.samples]
    scale = linear(values, left, WIDTH - _room(row.text for row in rows), zero=False)
    x_axis(drawing, scale, axis, _bottom(rows))
    for index, row in enumerate(rows):
        y = _middle(index)
        drawing.text(left - 12, y, row.label, "end")
        for place, value in enumerate(_thinned(row.samples)):
            jitter = (place * 0.618034 % 1 - 0.5) * ROW * 0.5
            drawing.add("circle", cx=scale(value), cy=y + jitter, r=2.6, class_=f"sample {row.kind}")
        for name, value in row.marks.items():
            height = ROW * (0.36 if name == "p50" else 0.2)
            drawing.add(
                "line",
                tip=f"{row.label}, {name}: {number(round(value, 4))}",
                x1=scale(value),
                x2=scale(value),
                y1=y - height,
                y2=y + height,
                class_=f"mark {name}",
            )
        drawing.text(WIDTH - _room(row.text for row in rows) + 12, y, row.text, class_="value")
    return drawing.render()


def stacks(title: str, axis: str, parts: Sequence[str], rows: Sequence[StackRow]) -> str:
    """Bars whose parts add up; part number ``n`` has the class ``part-n``."""
    drawing, left = _rows(title, [row.label for row in rows], above=LINE + 8)
    top = LINE + 8
    scale = linear([sum(row.parts) for row in rows], left, WIDTH - _room(row.text for row in rows))
    x_axis(drawing, scale, axis, _bottom(rows, top), top)
    x = left
    for place, name in enumerate(parts):
        drawing.add("rect", x=x, y=1, width=11, height=11, rx=2, class_=f"part-{place}")
        drawing.text(x + 16, 6.5, name, class_="axis")
        x += 16 + len(name) * CHARACTER + 18
    for index, row in enumerate(rows):
        y, begun = _middle(index, top), 0.0
        drawing.text(left - 12, y, row.label, "end")
        for place, (name, amount) in enumerate(zip(parts, row.parts, strict=True)):
            width = scale(amount) - scale(0)
            share = f"{amount / (sum(row.parts) or 1):.1%}"
            if width > 0:
                drawing.bar(scale(begun), y, width, f"part part-{place}", f"{row.label}, {name}: {share}")
            if width > len(share) * CHARACTER + 8:
                drawing.text(scale(begun) + width / 2, y, share, "middle", "on-part")
            begun += amount
        drawing.text(scale(begun) + 10, y, row.text, class_="value")
    return drawing.render()


def scatter(
    title: str, axes: tuple[str, str], points: Sequence[Point], limits: dict[str, float], reference: tuple[str, float]
) -> str:
    """Points; ``limits`` are horizontal lines by their labels, ``reference`` a vertical one."""
    height, left = 340.0, 64.0
    drawing = Drawing(title, WIDTH, height + 48)
    x = linear([reference[1], *(point.x for point in points)], left, WIDTH - 20)
    y = linear([*limits.values(), *(point.y for point in points)], height, 12)
    x_axis(drawing, x, axes[0], height)
    y_axis(drawing, y, axes[1], left)
    labels = Labels(left=left, right=WIDTH)
    for point in points:
        labels.keep_off(x(point.x), y(point.y))
    for text, limit in limits.items():
        drawing.line(left, y(limit), WIDTH - 20, y(limit), "limit")
        drawing.text(left + 8, y(limit) - 9, text, class_="axis")
        labels.keep_off(left + 8 + len(text) * CHARACTER / 2, y(limit) - 9, len(text) * CHARACTER / 2)
    drawing.line(x(reference[1]), 12, x(reference[1]), height, "reference")
    drawing.text(x(reference[1]) - 6, height - 10, reference[0], "end", "axis")
    for point in points:
        hollow = " hollow" * point.is_hollow
        tip = f"{point.label}: {number(round(point.x, 3))}, {number(round(point.y, 3))}"
        drawing.add("circle", tip=tip, cx=x(point.x), cy=y(point.y), r=6, class_=f"dot {point.kind}{hollow}")
        text_x, text_y, anchor = labels.place(x(point.x), y(point.y), point.label)
        if abs(text_y - y(point.y)) > LINE:
            drawing.line(x(point.x), y(point.y), text_x, text_y, "leader")
        drawing.text(text_x, text_y, point.label, anchor, "failed" if point.is_hollow else "label")
    return drawing.render()


def lines(
    title: str,
    axes: tuple[str, str],
    series: Sequence[Line],
    *,
    log_y: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> str:
    """Lines, each labelled at its end; ``ticks`` name the places on the x axis, where only some are any."""
    height, left = 300.0, 64.0
    right = WIDTH - max(len(each.label) for each in series) * CHARACTER - 24
    drawing = Drawing(title, WIDTH, height + 48)
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    x = linear([*xs, *(ticks or ())], left, right)
    y = (logarithmic if log_y else linear)(ys, height, 12)
    x_axis(drawing, x, axes[0], height, ticks=ticks)
    y_axis(drawing, y, axes[1], left, right)
    ends = spread([y(each.points[-1][1]) for each in series])
    for each, end in zip(series, ends, strict=True):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in each.points)
        drawing.add("polyline", points=path, class_=f"line {each.kind} dash-{each.dash % 4}")
        if len(each.points) <= 12:
            for a, b in each.points:
                tip = f"{each.label}: {number(round(a, 4))}, {number(float(f'{b:.4g}'))}"
                drawing.add("circle", tip=tip, cx=x(a), cy=y(b), r=3.5, class_=f"dot {each.kind}")
        last_x, last_y = each.points[-1]
        drawing.line(x(last_x) + 5, y(last_y), right + 14, end, "leader")
        drawing.text(right + 18, end, each.label)
    return drawing.render()


def waterfall(title: str, axis: str, bars: Sequence[Fall]) -> str:
    """Bars that hang from each other; those that start at 0 are wholes."""
    drawing, left = _rows(title, [bar.label for bar in bars])
    scale = linear([max(bar.start, bar.end) for bar in bars], left, WIDTH - _room(bar.text for bar in bars))
    x_axis(drawing, scale, axis, _bottom(bars))
    for index, bar in enumerate(bars):
        y = _middle(index)
        low, high = sorted((scale(bar.start), scale(bar.end)))
        drawing.text(left - 12, y, bar.label, "end")
        drawing.bar(low, y, max(high - low, 1.5), f"bar {bar.kind}", f"{bar.label}: {bar.text}")
        if index + 1 < len(bars) and bar.end in (bars[index + 1].start, bars[index + 1].end):
            drawing.line(scale(bar.end), y + 10, scale(bar.end), y + ROW - 10, "leader")
        drawing.text(high + 10, y, bar.text, class_="value")
    return drawing.render()


def _rows(title: str, labels: Sequence[str], above: float = 0) -> tuple[Drawing, float]:
    """An empty picture with a row for each label, and where the plot begins, right of the labels."""
    left = max(len(label) for label in labels) * CHARACTER + 24
    return Drawing(title, WIDTH, _bottom(labels, above) + 48), left


def _room(texts: Iterable[str]) -> float:
    """What is kept free on the right for what stands beside the rows."""
    return max((len(text) for text in texts), default=0) * (CHARACTER + 0.6) + 20


def _bottom(rows: Sequence[object], above: float = 0) -> float:
    return above + 8 + len(rows) * ROW


def _middle(index: int, above: float = 0) -> float:
    return above + 8 + (index + 0.5) * ROW


def _thinned(samples: Sequence[float]) -> list[float]:
    """In the order measured; of too many, an even choice by rank."""
    if len(samples) <= MOST_DOTS:
        return list(samples)
    ordered = sorted(samples)
    return [ordered[round(place * (len(ordered) - 1) / (MOST_DOTS - 1))] for place in range(MOST_DOTS)]
