"""The JSON of a server benchmark, its table, and what it says of its targets."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from bench_reports import server_report
from controlrt.perf.server.results import load, save
from controlrt.perf.server.server_table import header, table
from controlrt.perf.targets import verdicts
from controlrt.runtime.errors import UserError


def test_a_report_reads_back_as_it_was_written(tmp_path: Path) -> None:
    for report in (server_report(), msgspec.structs.replace(server_report(), complete=False, mixed=None, soak=None)):
        save(report, tmp_path / "server.json")
        assert load(tmp_path / "server.json") == report


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schema_version": 99}, "schema version 99"), ({"benchmark": "pipeline"}, "no result"), ({"x": 1}, "unknown")],
)
def test_another_file_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "server.json"
    save(server_report(), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load(file)


def test_only_what_came_in_time_is_goodput() -> None:
    found = server_report().overload
    assert found is not None
    assert found.seconds == 4.0
    assert found.goodput == pytest.approx(1 / 4.0)  # the second one took longer than it had
    assert found.steps_goodput == pytest.approx(4 / 4.0 / (1.2 * 74 / 3))
    assert (found.done, found.rejected, found.expired, found.failed) == (2, 1, 1, 0)
    assert found.rejection_p99 == 0.01


def test_targets_say_what_was_missed() -> None:
    missed = {target.name for target in server_report().targets() if not target.is_met}
    assert missed == {
        "overhead of 4 steps, png, seconds",
        "goodput at overload, over the capacity",
        "soak: pictures mixed up",
    }
    text = verdicts(server_report().targets())
    assert "p99 of 4-step requests, times better" in text
    assert text.count("MISSED") == 3


def test_tables_show_what_was_found() -> None:
    report = server_report()
    assert "policy shortest beside batch" in header(report)
    shown = "\n".join(
        table(part)
        for part in (report.capacity, report.mixed, report.overhead, report.overload, report.soak, report.shutdown)
    )
    for text in ("ratio 1.000", "4.00 [4.00, 4.00]", "10.00 [9.00, 11.00]", "p99 10.0 ms", "1 of 2 pictures mixed up"):
        assert text in shown
    with pytest.raises(TypeError):
        table(3)
