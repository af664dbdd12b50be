"""The page of statistics: that every layer is on it, that it is sound, and that no name can break it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from controlrt.calibration.report import document, drift, spread, write
from controlrt.compiler.quantization.histogram import Histogram
from controlrt.compiler.quantization.statistics import BINS, BUCKETS, About, LayerStatistics, Statistics
from controlrt.compiler.quantization.thresholds import METHODS, amax_of
from page_checker import HOSTILE, Checker

NAMES = ("down.0.conv1", "down.0.conv2", "mid.attentions.0.to_q")


def layer(seed: int, *, factor: float = 1) -> LayerStatistics:
    random = np.random.default_rng(seed)
    values = (random.laplace(size=(BUCKETS, 500)) * np.geomspace(1, 4, BUCKETS)[:, None] * factor).astype(np.float32)
    values[5] = 0  # no step was there
    histogram = Histogram()
    for bucket, each in enumerate(values):
        histogram.add(bucket, each)
    amax = np.abs(values).max(axis=1)
    return LayerStatistics(
        channel_amax=amax.max() * np.array([0.25, 0.5, 1], np.float32),
        bucket_amax=amax,
        histogram=histogram.counts,
        limit=histogram.limit,
    )


def nothing() -> LayerStatistics:
    return LayerStatistics(
        channel_amax=np.zeros(4, np.float32),
        bucket_amax=np.zeros(BUCKETS, np.float32),
        histogram=np.zeros((BUCKETS, BINS), np.int64),
        limit=0.0,
    )


def statistics(hostile: str = "") -> Statistics:
    unet = {name + hostile: layer(seed, factor=10.0 ** (3 * seed - 3)) for seed, name in enumerate(NAMES)}
    return Statistics(
        about=About(
            parts={f"unet{hostile}": "ab" * 32},
            data="demo" + hostile,
            cases=16,
            steps=10,
            samplers=("ddim" + hostile,),
            guidance_scales=(3, 7.5),
            size=(512, 256),
            seed=7,
            versions={"controlrt" + hostile: "0.1"},
        ),
        layers={"unet": unet, f"controlnet.canny{hostile}": {"zero": nothing()}},
    )


@pytest.fixture(scope="module")
def page() -> Checker:
    return Checker(document(statistics()))


def test_every_layer_has_a_row_and_a_picture_that_it_leads_to(page: Checker) -> None:
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    links = [value.removeprefix("#") for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert set(links) <= set(identifiers)
    assert sum(link.startswith("layer-") for link in links) == 4
    assert page.elements["details"] == 4
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert pictures == ["Layers of unet", *NAMES, "Layers of controlnet.canny", "zero"]
    assert all(page.words.count(name) >= 3 for name in NAMES)


def test_the_table_says_what_the_thresholds_are() -> None:
    text, found = document(statistics()), statistics().layers["unet"]["down.0.conv2"]
    (row,) = re.findall(r"<tr><th scope=\"row\"><a [^>]*>down\.0\.conv2</a></th>(.*?)</tr>", text)
    cells = re.findall(r"<td>(.*?)</td>", row)
    expected = [amax_of(found, method) for method in ("minmax", *(each for each in METHODS if each != "minmax"))]
    assert [float(cell) for cell in cells[1:-2]] == pytest.approx(expected, rel=1e-3)
    assert cells[0] == "3"
    assert float(cells[-2]) == pytest.approx(found.bucket_amax.max() / np.sort(found.bucket_amax)[1], rel=1e-3)
    assert cells[-1] == "2"


def test_layers_of_nothing() -> None:
    assert drift(nothing()) is None
    assert spread(nothing()) is None


def test_origin_and_size(page: Checker) -> None:
    for text in ("What 4 layers", "16 cases, 10 steps, 512×256", "3, 7.5", "ab" * 32, "controlrt 0.1"):
        assert text in page.words


def test_nothing_points_outside_and_no_number_is_none() -> None:
    text = document(statistics())
    assert not re.search(r"https?://|//[a-z]|url\(|@import|<script|<link|<img", text)
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_names_cannot_break_the_page(page: Checker) -> None:
    checked = Checker(document(statistics(HOSTILE)))
    assert checked.elements == page.elements
    assert HOSTILE in checked.words


def test_it_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    write(statistics(), file)
    assert file.read_text(encoding="utf-8") == document(statistics())
    assert [each.name for each in file.parent.iterdir()] == ["page.html"]
