"""SVG by hand: elements, scales with round ticks, and labels that keep off each other."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH = 880.0
"""Of a picture as wide as the page."""
CHARACTER = 6.7
"""Width of a character on average, pixels, at the page's label size; SVG cannot be asked before it is drawn."""
LINE = 15.0
"""Height of a line of labels."""
BAR = 20.0
"""Height of a horizontal bar."""


class Drawing:
    """A picture that grows element by element. Colours and fonts are the page's, by class.

    Args:
        title: what it shows, read aloud by screen readers.
        width: of the picture, in pixels, as is ``height``.
        height: may be set later.
    """

    def __init__(self, title: str, width: float, height: float = 0) -> None:
        self.title, self.width, self.height = title, width, height
        self._elements: list[str] = []

    def add(self, element: str, text: str = "", tip: str = "", **attributes: object) -> None:
        """Adds an element.

        Args:
            element: its name.
            text: in it.
            tip: shown where the pointer rests on it.
            **attributes: ``class_`` for ``class``, ``stroke_width`` for ``stroke-width``; numbers are rounded.
        """
        named = "".join(
            f' {name.rstrip("_").replace("_", "-")}="{html.escape(_shown(value))}"'
            for name, value in attributes.items()
        )
        inside = (f"<title>{html.escape(tip)}</title>" if tip else "") + html.escape(text)
        self._elements.append(f"<{element}{named}>{inside}</{element}>")

    def text(self, x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> None:
        """Adds a label whose middle is at ``y``."""
        self.add("text", text, x=x, y=y + 4.2, text_anchor=anchor, class_=class_ or "label")

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        """Adds a line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)

    def bar(self, x: float, y: float, width: float, class_: str, tip: str) -> None:
        """Adds a horizontal bar whose middle is at ``y``."""
        self.add("rect", tip=tip, x=x, y=y - BAR / 2, width=width, height=BAR, class_=class_)

    def render(self) -> str:
        """The picture as markup."""
        size = f"{_shown(self.width)} {_shown(self.height)}"
        return (
            f'<svg viewBox="0 0 {size}" width="{_shown(self.width)}" role="img" aria-label="{html.escape(self.title)}">'
            f"{''.join(self._elements)}</svg>"
        )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where on the picture a number is."""

    low: float
    high: float
    start: float
    """The pixel of ``low``."""
    end: float
    is_logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a number."""
        position, low, high = (self._position(each) for each in (value, self.low, self.high))
        return self.start + (self.end - self.start) * (position - low) / ((high - low) or 1)

    def ticks(self, most: int = 7) -> list[float]:
        """Round numbers within the scale: 1, 2 or 5 times a power of ten apart, powers of ten where logarithmic."""
        if self.is_logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((last - first + 1) / most))
            return [10.0**power for power in range(first, last + 1, stride)]
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _position(self, value: float) -> float:
        return math.log10(value) if self.is_logarithmic else value


def linear(values: Sequence[float], start: float, end: float, *, zero: bool = True) -> Scale:
    """A scale that all values fit on, with some room at the upper end; from 0 on unless ``zero`` is off."""
    low, high = min(values), max(values)
    room = 0.06 * ((high - (0 if zero else low)) or abs(high) or 1)
    return Scale(low=min(0.0, low) if zero else low - room, high=high + room, start=start, end=end)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale over whole powers of ten; numbers of 0 and less have no place on it."""
    return Scale(
        low=10.0 ** math.floor(math.log10(min(values))),
        high=10.0 ** math.ceil(math.log10(max(values)) + 1e-9),
        start=start,
        end=end,
        is_logarithmic=True,
    )


def x_axis(
    drawing: Drawing, scale: Scale, label: str, y: float, top: float = 8, ticks: Mapping[float, str] | None = None
) -> None:
    """Draws a grid of vertical lines from ``top`` to ``y``, under it numbers or what ``ticks`` says, and a label."""
    for tick, text in (ticks or {tick: number(tick) for tick in scale.ticks()}).items():
        drawing.line(scale(tick), top, scale(tick), y, "grid")
        drawing.text(scale(tick), y + 13, text, "middle", "axis")
    drawing.line(scale.start, y, scale.end, y, "rule")
    drawing.text((scale.start + scale.end) / 2, y + 35, label, "middle", "axis title")


def y_axis(drawing: Drawing, scale: Scale, label: str, left: float, right: float = WIDTH - 20) -> None:
    """Draws a grid of horizontal lines from ``left`` to ``right``, its numbers and a label on its left."""
    for tick in scale.ticks():
        drawing.line(left, scale(tick), right, scale(tick), "grid")
        drawing.text(left - 8, scale(tick), number(tick), "end", "axis")
    middle = (scale.start + scale.end) / 2
    drawing.add(
        "text",
        label,
        x=14,
        y=middle,
        text_anchor="middle",
        class_="axis title",
        transform=f"rotate(-90 14 {middle:.1f})",
    )


def number(value: float) -> str:
    """A tick's number: ``0.25``, ``12``, ``1e-6``."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.10g}" if abs(value) < 1e4 else f"{value:,.0f}"


def spread(wanted: Sequence[float], gap: float = LINE) -> list[float]:
    """Places as near to the wanted ones as can be in one sweep, in their order, none nearer than ``gap`` to another."""
    placed = dict.fromkeys(range(len(wanted)), 0.0)
    before = -math.inf
    for index in sorted(placed, key=lambda each: wanted[each]):
        before = placed[index] = max(wanted[index], before + gap)
    overshoot = sum(placed[index] - wanted[index] for index in placed) / max(len(wanted), 1)
    return [placed[index] - overshoot for index in range(len(wanted))]


@dataclass
class Labels:
    """Places labels beside points so that none covers another, or a point."""

    left: float
    right: float
    """Pixels that they must stay between."""
    _taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def keep_off(self, x: float, y: float, radius: float = 6) -> None:
        """Nothing is put there."""
        self._taken.append((x - radius, y - radius, x + radius, y + radius))

    def place(self, x: float, y: float, text: str) -> tuple[float, float, str]:
        """The nearest free place of those around a point: x, y and anchor."""
        width = len(text) * CHARACTER
        boxes = list(self._around(x, y, width))
        at, box = next(((at, box) for at, box in boxes if self._is_free(box)), boxes[0])
        self._taken.append(box)
        return at

    def _around(
        self, x: float, y: float, width: float
    ) -> Iterator[tuple[tuple[float, float, str], tuple[float, float, float, float]]]:
        for distance in range(8):
            for side in (-1, 1) if distance else (1,):
                line = y + side * distance * LINE * 0.8
                for anchor, start in (("start", x + 9), ("end", x - 9 - width)):
                    edge = start if anchor == "start" else x - 9
                    yield (edge, line, anchor), (start, line - LINE / 2, start + width, line + LINE / 2)

    def _is_free(self, box: tuple[float, float, float, float]) -> bool:
        x1, y1, x2, y2 = box
        inside = self.left <= x1 and x2 <= self.right
        return inside and all(x2 < a or c < x1 or y2 < b or d < y1 for a, b, c, d in self._taken)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _shown(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
