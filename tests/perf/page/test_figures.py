"""What is plotted is what was measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench_reports import CONTENDERS, EAGER, SHARES, full_report, scenario
from controlrt.perf.page import figures
from controlrt.perf.page.header import find_headline
from controlrt.perf.page.quantities import readable_seconds
from controlrt.perf.report import load_ablation

ABLATION = Path(__file__).parents[3] / "perf" / "results" / "ablation-sd15.json"


def test_the_fastest_right_picture_comes_first_and_wrong_ones_last() -> None:
    names = [contender.name for contender, _ in figures.measured(scenario())]
    assert names[0] == "openvino"
    assert names[-1] == "openvino-bf16"
    assert "torch.compile" not in names


def test_the_headline_is_a_right_picture_that_is_not_pytorchs() -> None:
    headline = find_headline(scenario())
    assert headline is not None
    assert headline.contender.name == "openvino"
    assert headline.ratio.value == pytest.approx(2.75 / 1.9, rel=0.01)
    pytorch = {name: made for name, made in CONTENDERS.items() if made.runtime == "pytorch"}
    alone = find_headline(scenario(pytorch))
    assert alone is not None
    assert alone.contender.name == EAGER
    failed = msgspec.structs.replace(scenario(), contenders=())
    assert find_headline(failed) is None


def test_parts_add_up_to_the_mean_call() -> None:
    for contender, found in figures.measured(scenario(steps=(10, 20))):
        parts = figures.stage_means(found)
        mean = sum(found.samples.picture) / len(found.samples.picture)
        assert sum(parts) == pytest.approx(mean), contender.name
        assert parts[0] == pytest.approx(mean * SHARES["text"])
        assert parts[3] == pytest.approx(mean * (0.99 - sum(SHARES.values())))
        assert parts[5] == pytest.approx(mean * 0.01)


def test_every_contender_has_a_row_and_a_failed_one_its_reason() -> None:
    plot = figures.speedups(scenario())
    assert all(f">{name}</text>" in plot for name in CONTENDERS)
    assert "failed: no C++ compiler: &lt;g++&gt; &amp; clang not found" in plot
    assert "2.50× (wrong picture)" in plot


def test_curves_need_two_points_and_hold_right_pictures_only() -> None:
    report = full_report()
    offline = [each for each in report.scenarios if each.kind == "offline"]
    plot = figures.offline(offline)
    assert plot is not None
    assert "openvino-bf16" not in plot
    assert plot.count("<polyline") == 6
    assert figures.offline(offline[:1]) is None
    resolutions = [each for each in report.scenarios if each.axis == "resolution"]
    plot = figures.sweep("resolution", resolutions)
    assert plot is not None
    assert "768×768" in plot
    assert figures.sweep("resolution", resolutions[:1]) is None


def test_nothing_to_compare_makes_no_plot() -> None:
    alone = scenario({EAGER: CONTENDERS[EAGER]})
    assert figures.parity(alone) is None
    assert figures.latent_errors(alone) is None


def test_the_waterfall_ends_where_the_last_variant_is() -> None:
    """In the units of the reference: its median over how many times faster the variant is."""
    ablation = load_ablation(ABLATION)
    plots = figures.waterfalls(ablation)
    assert list(plots) == ["onnxruntime", "openvino"]
    by_name = {variant.name: variant for variant in ablation.variants}
    base = by_name["plain-onnxruntime"].median_seconds
    last = by_name["onnxruntime+binding-times"].speedup_over_plain.value
    assert readable_seconds(base / last) in plots["onnxruntime"]
    assert f"−{100 * (1 - 1 / last):.1f}%" in plots["onnxruntime"]


def test_a_pass_whose_gain_may_be_chance_is_marked() -> None:
    """Rounds of the last variant that lie on both sides of the plain export's."""
    ablation = load_ablation(ABLATION)
    assert "(noise)" not in figures.waterfalls(ablation)["onnxruntime"]
    scattered = tuple(
        msgspec.structs.replace(each, samples_seconds=(20.0, 5.0, 20.0, 5.0, 11.0))
        if each.name == "onnxruntime+binding-times"
        else each
        for each in ablation.variants
    )
    assert "(noise)" in figures.waterfalls(msgspec.structs.replace(ablation, variants=scattered))["onnxruntime"]


def test_times_have_three_digits() -> None:
    assert [readable_seconds(each) for each in (123.4, 1.9, 0.9999, 0.01234, 4.5e-4, 0)] == [
        "123 s",
        "1.90 s",
        "1.00 s",
        "12.3 ms",
        "450 µs",
        "0 s",
    ]
