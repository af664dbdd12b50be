"""Scales, ticks and labels."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlrt.runtime.page.svg import CHARACTER, LINE, Drawing, Labels, Scale, linear, logarithmic, number, spread

NAMES = (
    *("eager", "eager-channels-last", "torch.compile", "plain-onnxruntime", "plain-openvino"),
    *("onnxruntime", "openvino", "openvino-bf16"),
)
"""Of points."""


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_within(low: float, share: float) -> None:
    width = low * share
    scale = Scale(low=low, high=low + width, start=0, end=100)
    ticks = scale.ticks()
    assert len(ticks) <= 8
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    for step in steps:
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - round_one) for round_one in (1, 2, 5)) < 1e-3


def test_scales() -> None:
    scale = Scale(low=0, high=10, start=100, end=300)
    assert (scale(0), scale(5), scale(10)) == (100, 200, 300)
    logs = logarithmic([3e-6, 0.5], 300, 0)
    assert (logs.low, logs.high) == pytest.approx((1e-6, 1))
    assert logs.ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert logs(1e-3) == pytest.approx(150)
    assert linear([2, 4], 0, 100).low == 0
    assert linear([2, 4], 0, 100, zero=False).low < 2


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=9))
def test_everything_fits_on_its_scale(values: list[float]) -> None:
    for scale in (linear(values, 0, 100), linear(values, 0, 100, zero=False), logarithmic(values, 0, 100)):
        assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=10))
def test_labels_at_the_ends_of_lines_keep_their_order_and_distance(wanted: list[float]) -> None:
    placed = sorted(spread(wanted))
    assert all(b - a >= LINE - 1e-6 for a, b in itertools.pairwise(placed))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert placed == pytest.approx([spread(wanted)[index] for index in order])


def test_labels_of_points_do_not_cover_each_other() -> None:
    points = [(100.0 + 20 * index, 50.0) for index in range(len(NAMES))]
    labels = Labels(left=0, right=800)
    for x, y in points:
        labels.keep_off(x, y)
    boxes = []
    for (x, y), name in zip(points, NAMES, strict=True):
        at, line, anchor = labels.place(x, y, name)
        width = len(name) * CHARACTER
        left = at if anchor == "start" else at - width
        assert 0 <= left <= left + width <= 800
        boxes.append((left, line - LINE / 2, left + width, line + LINE / 2))
    for index, (left, top, right, bottom) in enumerate(boxes):
        for a, b, c, d in boxes[:index]:
            assert right <= a or c <= left or bottom <= b or d <= top


def test_drawings_are_escaped_xml() -> None:
    drawing = Drawing('<a> & "b"', 100, 50)
    drawing.add("text", "1 < 2 & 3", tip='"<tip>"', x=1.239, class_="label", text_anchor="end")
    (element,) = ET.fromstring(drawing.render())
    assert element.attrib == {"x": "1.24", "class": "label", "text-anchor": "end"}
    assert [element[0].text, element[0].tail] == ['"<tip>"', "1 < 2 & 3"]


def test_numbers() -> None:
    assert [number(value) for value in (0, 0.25, 0.30000000000000004, 12, 20000, 1e-6)] == [
        "0",
        "0.25",
        "0.3",
        "12",
        "20,000",
        "1e-6",
    ]
