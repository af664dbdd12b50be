"""docs/annotators.md says what the registry says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from controlrt.runtime.annotators import ANNOTATORS
from controlrt.runtime.annotators.annotator import PROCESSOR_RES
from controlrt.runtime.fitting import EXTENSION_MODES, RESIZES, resize_named

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_annotators", DOCS / "annotators.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["annotators", "parameters", "networks"])
def test_tables_are_the_registrys(script: ModuleType, name: str) -> None:
    page = (DOCS / "annotators.md").read_text()
    assert script.replaced(page, name, script.tables()[name]) == page, "run: python docs/annotators.py"


def test_tables_name_everything(script: ModuleType) -> None:
    tables = script.tables()
    for annotator in ANNOTATORS.values():
        (row,) = (row for row in tables["annotators"].splitlines() if row.startswith(f"| `{annotator.name}` |"))
        assert all(f"`{name}`" in row for name in annotator.names)
        rows = [row for row in tables["parameters"].splitlines() if row.startswith(f"| `{annotator.name}` |")]
        own = [parameter for parameter in annotator.parameters if parameter is not PROCESSOR_RES]
        (of_all,) = (row for row in tables["parameters"].splitlines() if row.startswith("| all but "))
        assert (f"`{annotator.name}`" in of_all) != (PROCESSOR_RES in annotator.parameters)
        for row, parameter in zip(rows, own, strict=True):
            assert parameter.name in row
            assert parameter.help in row
            assert row.count("|") == 6


def test_every_resize_mode_is_there() -> None:
    page = (DOCS / "annotators.md").read_text()
    for number, name in enumerate(EXTENSION_MODES):
        assert f"| `{resize_named(name)}` | {name} | {number} |" in page
    assert all(f"| `{name}` |" in page for name in RESIZES)
