"""Pages of results that were measured, as they lie in the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from controlrt.runtime.commands import main
from page_checker import Checker

RESULTS = Path(__file__).parents[3] / "perf" / "results"
MEASURED = {file.name: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}


def of_kind(*kinds: str) -> list[str]:
    return [name for name, result in MEASURED.items() if result.get("benchmark") in kinds]


def page_of(name: str, directory: Path) -> str:
    assert main(["bench", "page", str(RESULTS / name), "--output", str(directory / "page.html")]) == 0
    return (directory / "page.html").read_text()


@pytest.mark.parametrize("name", of_kind("pipeline", "server"))
def test_a_page_of_it_opens_without_a_network(name: str, tmp_path: Path) -> None:
    page, result = page_of(name, tmp_path), MEASURED[name]
    checked = Checker(page)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img", page)
    assert result["command"] in checked.words
    assert result["commit"]["hash"] in checked.words
    assert result["machine"]["cpu"] in checked.words
    assert checked.elements["svg"] + checked.elements["table"] >= 1


def contenders(result: Any) -> set[str]:
    """Names of all contenders of all scenarios, by a walk of the file that knows nothing of its schema."""
    if isinstance(result, dict):
        own = {each["name"] for each in result.get("contenders", ()) if isinstance(each, dict)}
        return own.union(*(contenders(each) for each in result.values()))
    return set().union(*(contenders(each) for each in result)) if isinstance(result, list) else set()


@pytest.mark.parametrize("name", of_kind("pipeline"))
def test_every_contender_that_was_measured_is_on_it(name: str, tmp_path: Path) -> None:
    named = contenders(MEASURED[name])
    words = Checker(page_of(name, tmp_path)).words
    assert len(named) >= 3
    assert all(each in words for each in named)
