"""The page as a whole: what it says, and that nothing in a result can break it."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench_reports import CONTENDERS, MACHINE, full_report, report, scenario
from controlrt.perf.page.document import document
from controlrt.perf.report import AblationReport, load_ablation
from controlrt.perf.results import Report, Scenario, save
from controlrt.runtime.commands import main
from controlrt.runtime.errors import UserError
from page_checker import HOSTILE, Checker

ABLATION = Path(__file__).parents[3] / "perf" / "results" / "ablation-sd15.json"
KEPT = {"benchmark", "kind", "axis", "status", "created", "schema_version"}
"""Fields of fixed words."""


@pytest.fixture(scope="module")
def ablation() -> AblationReport:
    return load_ablation(ABLATION)


@pytest.fixture(scope="module")
def page(ablation: AblationReport) -> str:
    return document(full_report(), ablation)


def test_the_page_is_well_formed(page: str) -> None:
    checked = Checker(page)
    assert checked.elements["h1"] == checked.elements["main"] == checked.elements["nav"] == 1
    identifiers = [value for _, name, value in checked.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    targets = [value for tag, name, value in checked.attributes if (tag, name) == ("a", "href")]
    assert targets
    assert all(target.removeprefix("#") in identifiers for target in targets)


def test_nothing_points_outside(page: str) -> None:
    assert not re.search(r"https?://|//[a-z]|url\(|@import|<script|<link|<img", page)
    checked = Checker(page)
    assert {value for _, name, value in checked.attributes if name in ("src", "xlink:href", "action")} == set()


def test_every_contender_and_its_reason_are_named(page: str) -> None:
    words = Checker(page).words
    for name, made in CONTENDERS.items():
        assert words.count(name) >= 3
        assert made.reason in words
    assert "1.45×" in words
    assert "controlrt bench bundles/demo-512x512 --output result.json" in words
    assert MACHINE.cpu in words
    assert "0123456789abcdef" in words


def test_plots_have_names_and_tables_can_be_scrolled_with_the_keyboard(page: str) -> None:
    checked = Checker(page)
    assert sum(tag == "svg" and name == "aria-label" for tag, name, _ in checked.attributes) == checked.elements["svg"]
    assert checked.elements["svg"] >= 10
    stops = [tag for tag, name, _ in checked.attributes if name == "tabindex"]
    assert stops.count("div") == checked.elements["table"]
    assert stops.count("figure") == checked.elements["figure"]


def test_colours_are_there_for_both_modes_and_paper(page: str) -> None:
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in style.split("color-scheme: dark)", 1))
    assert dark - {"--c"} == light
    assert "@media print" in style
    used = set(re.findall(r"var\((--[\w-]+)\)", style))
    assert used == light | {"--c"}


def hostile(value: Any, field: str = "") -> Any:
    """A result whose every free text tries to break out of the page."""
    if isinstance(value, dict):
        free = field in ("versions", "options", "controls", "lost")
        return {hostile(name) if free else name: hostile(each, name) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [hostile(each, field) for each in value]
    return value + HOSTILE if isinstance(value, str) and field not in KEPT else value


def test_text_of_results_cannot_break_the_page(ablation: AblationReport) -> None:
    bad = msgspec.convert(hostile(msgspec.to_builtins(full_report())), Report)
    plain = Checker(document(full_report()))
    checked = Checker(document(bad))
    assert checked.elements.keys() == plain.elements.keys()
    assert all(checked.elements[tag] == plain.elements[tag] for tag in ("td", "th", "dd", "p", "svg", "circle", "rect"))
    assert HOSTILE in checked.words
    kept = {"runtime", "benchmark"}  # an ablation's runtimes are fixed words
    raw = msgspec.to_builtins(ablation)
    for variant in raw["variants"]:
        variant |= {name: hostile(each, name) for name, each in variant.items() if name not in kept}
    raw["groups"] = hostile(raw["groups"])
    raw["reference"], raw["eager"] = raw["reference"] + HOSTILE, raw["eager"] + HOSTILE
    raw["command"], raw["lost"] = HOSTILE, {HOSTILE: HOSTILE}
    assert "<script" not in document(report(), msgspec.convert(raw, AblationReport))


def only(change: dict[str, Any], name: str = "openvino") -> Scenario:
    """The single stream with fields of one contender's measurement replaced."""
    made = scenario()
    contenders = tuple(
        msgspec.structs.replace(each, measurement=msgspec.structs.replace(each.measurement, **change))
        if each.name == name and each.measurement is not None
        else each
        for each in made.contenders
    )
    return msgspec.structs.replace(made, contenders=contenders)


def test_results_with_holes_make_a_page_too() -> None:
    everything_failed = msgspec.structs.replace(
        scenario(),
        reference=None,
        reference_samples=(),
        eager=None,
        contenders=tuple(
            msgspec.structs.replace(each, status="failed", reason="no memory", measurement=None)
            for each in scenario().contenders
        ),
    )
    words = Checker(document(report(everything_failed))).words
    assert "Nothing could be compared" in words
    assert "no memory" in words
    holes = {"parity": None, "speedup_over_eager": None, "flops_per_picture": None, "flops_per_second": None}
    Checker(document(report(only(holes))))


def test_what_to_be_careful_about_is_told() -> None:
    busy = msgspec.structs.replace(MACHINE, load_average=3.5)
    cut = msgspec.structs.replace(report(machine=busy), complete=False)
    words = Checker(document(cut)).words
    assert "was interrupted" in words
    assert "load 3.5 on 2 cores" in words
    assert "wrong picture: PSNR 11.0 dB" in words


def test_a_result_without_scenarios_is_refused() -> None:
    with pytest.raises(UserError, match="no scenario in it"):
        document(msgspec.structs.replace(report(), scenarios=()))


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, target = tmp_path / "result.json", tmp_path / "new" / "page.html"
    save(report(), result)
    assert main(["bench", "page", str(result), str(ABLATION), "-o", str(target)]) == 0
    assert target.read_text(encoding="utf-8") == document(report(), load_ablation(ABLATION))
    assert capsys.readouterr().out == f"{target}\n"


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, bad = tmp_path / "result.json", tmp_path / "bad.json"
    save(report(), result)
    bad.write_text("{}")
    edited = tmp_path / "edited.json"
    edited.write_text(ABLATION.read_text().replace('"name": "eager"', '"name": "other"'))
    target = tmp_path / "page.html"
    for arguments, message in (
        ([bad, "-o", target], "is no result of controlrt bench: "),
        ([result, result, "-o", target], "is no result of controlrt bench ablation: "),
        ([tmp_path / "none.json", "-o", target], "No such file"),
        ([result, edited, "-o", target], "has no rounds of other; the file was edited"),
        ([result, "-o", result], "is a result itself"),
    ):
        assert main(["bench", "page", *map(str, arguments)]) == 2
        assert message in html.unescape(capsys.readouterr().err)
        assert not target.exists()
