"""The schema of a result: written, read back, and refused where it is something else."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from bench_reports import full_report
from controlrt.perf.changes.results import load as load_changes
from controlrt.perf.report import load_ablation
from controlrt.perf.results import load, save
from controlrt.perf.server.results import load as load_server
from controlrt.runtime.errors import UserError

RESULTS = Path(__file__).parents[2] / "perf" / "results"
LOADERS = {"pipeline": load, "server": load_server, "changes": load_changes, "ablation": load_ablation}


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    report = full_report()
    file = tmp_path / "new" / "result.json"
    save(report, file)
    assert load(file) == report
    assert json.loads(file.read_text())["scenarios"][0]["contenders"][0]["name"] == "eager"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("name", [file.name for file in sorted(RESULTS.glob("*.json"))])
def test_committed_results_fit_their_schema_and_say_how_they_came_about(name: str) -> None:
    result = json.loads((RESULTS / name).read_text())
    assert result["command"].startswith(("controlrt bench", "python perf/"))
    assert result["commit"]
    if (kind := result.get("benchmark")) in LOADERS:
        LOADERS[kind](RESULTS / name)


def test_an_incomplete_report_is_one_too(tmp_path: Path) -> None:
    report = msgspec.structs.replace(full_report(), complete=False, scenarios=())
    save(report, tmp_path / "result.json")
    assert load(tmp_path / "result.json") == report


def test_scenarios_are_found_by_name() -> None:
    report = full_report()
    assert report.scenario("mixed steps").kind == "mixed-steps"
    assert [each.name for each in report.scenario("single stream").failed] == ["torch.compile", "openvino-bf16"]
    with pytest.raises(KeyError):
        report.scenario("nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"benchmark": "ablation"}, "no result of controlrt bench"),
        ({"surprise": 1}, "unknown field `surprise`"),
    ],
)
def test_another_file_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    save(full_report(), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load(file)
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "missing.json")
