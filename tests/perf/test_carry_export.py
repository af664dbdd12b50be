"""Exports without their weights, made whole again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from controlrt.engines.build import export_programs
from controlrt.perf.models import BenchModel, prepare_model
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BuildError
from controlrt.runtime.profile import ShapeProfile

SCRIPT = Path(__file__).parents[2] / "perf" / "carry_export.py"
PROFILE = ShapeProfile.parse("512x512", "1-4")


@pytest.fixture(scope="module")
def carry() -> ModuleType:
    spec = importlib.util.spec_from_file_location("carry_export", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> BenchModel:
    return prepare_model("demo")


@pytest.fixture(scope="module")
def packed(carry: ModuleType, model: BenchModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The export, and what is carried of it."""
    export = export_programs(model.source, model.controls, PROFILE)
    target = tmp_path_factory.mktemp("packed") / "demo"
    carry.pack(export, model, target)
    return export, target


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def test_every_file_is_as_it_was_traced(
    carry: ModuleType,
    model: BenchModel,
    packed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export, carried = packed
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path))
    whole = carry.unpack(carried, model, PROFILE)
    assert Bundle.open(whole).manifest.files == Bundle.open(export).manifest.files  # opening compares the digests
    assert whole.name == export.name  # the key that an export here would have
    assert size(carried) < size(export) / 3
    before = whole.stat().st_mtime_ns
    assert carry.unpack(carried, model, PROFILE).stat().st_mtime_ns == before


def test_another_checkpoint_is_refused(
    carry: ModuleType,
    model: BenchModel,
    packed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path))
    monkeypatch.setattr(carry, "_float32", lambda value: value.astype("float32") + 1)
    with pytest.raises(BuildError, match=r"is not as it was traced: the checkpoint of demo is another one"):
        carry.unpack(packed[1], model, PROFILE)
    assert not list((tmp_path / "exports").iterdir())
