"""``controlrt bench compare``: exit codes and what it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench_reports import CONTENDERS, Made, report, scenario
from controlrt.perf.compare import parse_threshold, table
from controlrt.perf.comparison import compare_reports
from controlrt.perf.results import SCHEMA_VERSION, Report, save
from controlrt.runtime.commands import main
from controlrt.runtime.errors import ParameterError

SLOWER = CONTENDERS | {"openvino": Made(seconds=2.1, runtime="openvino")}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return written(tmp_path / "old.json", report(scenario(seed=0)))


def written(file: Path, result: Report) -> Path:
    save(result, file)
    return file


def compare(*arguments: object) -> int:
    return main(["bench", "compare", *map(str, arguments)])


def test_nothing_changed(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(old, written(tmp_path / "new.json", report(scenario(seed=1)))) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "no C++ compiler" in shown.out
    assert "all of them at once with 95%" in shown.out


def test_a_regression_ends_with_1(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = written(tmp_path / "new.json", report(scenario(SLOWER, seed=1)))
    assert compare(old, new) == 1
    shown = capsys.readouterr()
    (line,) = (line for line in shown.out.splitlines() if line.startswith("single stream  openvino  "))
    assert line.split()[-1] == "slower"
    assert shown.err.startswith("error: single stream: openvino takes 1.1")
    assert compare(old, new, "--threshold", "20%") == 0


def test_what_broke_ends_with_1(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = CONTENDERS | {"openvino": Made(runtime="openvino", status="failed", reason="out of memory")}
    assert compare(old, written(tmp_path / "new.json", report(scenario(broken, seed=1)))) == 1
    assert "openvino ran rightly before and does no more: out of memory" in capsys.readouterr().err


def test_the_units_are_told() -> None:
    comparison = compare_reports(report(scenario(seed=0)), report(scenario(seed=1, slowness=1.5)))
    assert "single stream: new/old is in units of eager beside it, not seconds" in table(comparison)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no result of controlrt bench: "),
        ('{"benchmark": "ablation"}', "is no result of controlrt bench: Invalid enum value 'ablation'"),
        ("[]", "is no result of controlrt bench: "),
    ],
)
def test_files_that_are_no_results(
    old: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    for pair in ((old, bad), (bad, old)):
        assert compare(*pair) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"{bad} {message}" in shown.err
        assert len(shown.err.splitlines()) == 1


def test_files_that_are_not_there_or_of_another_time(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(old, tmp_path / "none.json") == 2
    assert "none.json: No such file" in capsys.readouterr().err
    later = msgspec.structs.replace(report(), schema_version=SCHEMA_VERSION + 1)
    assert compare(old, written(tmp_path / "later.json", later)) == 2
    assert f"schema version {SCHEMA_VERSION + 1}; this controlrt reads {SCHEMA_VERSION}" in capsys.readouterr().err


def test_results_without_anything_in_common(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(old, written(tmp_path / "new.json", report(scenario(name="mixed steps")))) == 2
    assert "error: no scenario in common" in capsys.readouterr().err


def test_thresholds() -> None:
    assert parse_threshold("3%") == 0.03
    assert parse_threshold("0.5%") == 0.005
    for text in ("3", "0.03", "-1%", "101%", "three", "%"):
        with pytest.raises(ParameterError, match="such as 3%"):
            parse_threshold(text)
