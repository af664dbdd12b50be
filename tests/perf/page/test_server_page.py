"""The page of a server's result: what it says, that it is sound, and that nothing in a result can break it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench_reports import server_report
from controlrt.perf.page.server_page import server_document
from controlrt.perf.server.results import Resident, ServerReport, save
from controlrt.runtime.commands import main
from controlrt.runtime.errors import UserError
from page_checker import HOSTILE, Checker

PARTS = ("capacity", "mixed", "overhead", "overload", "soak", "shutdown")


def test_it_shows_every_part() -> None:
    page = Checker(server_document(server_report()))
    for text in ("4.00×", "MISSED", "4 steps, shortest", "Overload", "SIGTERM", "1 of 2 pictures", "another picture"):
        assert text.lower() in page.words.lower(), text
    assert "svg" in page.elements


@pytest.mark.parametrize("part", PARTS)
def test_one_part_is_enough(part: str) -> None:
    report = server_report()
    report = msgspec.structs.replace(report, **{name: None for name in PARTS if name != part}, complete=False)
    assert "parts are missing" in Checker(server_document(report)).words


def test_without_a_part_there_is_no_page() -> None:
    empty = msgspec.structs.replace(server_report(), **dict.fromkeys(PARTS))
    with pytest.raises(UserError, match="no part"):
        server_document(empty)


def test_memory_is_a_line() -> None:
    report = server_report()
    assert report.soak is not None
    resident = tuple(Resident(seconds=float(n), answered=n, resident_bytes=10**9 + n) for n in range(40))
    soak = msgspec.structs.replace(report.soak, resident=resident)
    assert "MiB of server and workers" in Checker(server_document(msgspec.structs.replace(report, soak=soak))).words


def test_hostile_words_stay_words() -> None:
    report = server_report()
    assert report.soak is not None
    soak = msgspec.structs.replace(report.soak, lost=(HOSTILE,), outcomes={HOSTILE: {HOSTILE: 1}})
    setting = msgspec.structs.replace(report.setting, bundle=HOSTILE, control=HOSTILE, backend=HOSTILE)
    page = Checker(server_document(msgspec.structs.replace(report, soak=soak, setting=setting, command=HOSTILE)))
    assert "script" not in page.elements
    assert HOSTILE in page.words


def written(report: ServerReport, directory: Path) -> Path:
    save(report, directory / "server.json")
    return directory / "server.json"


def test_the_command_knows_a_server_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = written(server_report(), tmp_path), tmp_path / "page.html"
    assert main(["bench", "page", str(file), "-o", str(page)]) == 0
    assert "shorter waits for short requests" in page.read_text()
    assert main(["bench", "page", str(file), str(file), "-o", str(page)]) == 2
    assert "no place for an ablation" in capsys.readouterr().err
