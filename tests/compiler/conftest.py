"""Exports of the small checkpoints; they stay in the cache, which tests/parity shares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from families import Family


@pytest.fixture(scope="module")
def exported(family: Family) -> Path:
    """The directory of the family's export: the programs as traced, before any pass."""
    from controlrt.export.exporter import ExportOptions, export
    from controlrt.runtime.profile import ShapeProfile
    from families import SIDE

    options = ExportOptions(
        **family.sources(),
        profile=ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-4"),
    )
    return export(options, "pytest").path
