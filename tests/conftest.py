"""Bundles that several tests share. What they build stays in the cache, so a second run builds nothing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from controlrt.runtime import ControlNetPipeline
    from families import Family

ROOT = Path(__file__).parent.parent
os.environ.setdefault("CONTROLRT_CACHE", str(ROOT / ".cache"))
os.environ["HF_HUB_OFFLINE"] = "1"
# the same examples in every run; others with: pytest --hypothesis-profile default
settings.load_profile("ci")
DEMO_BUNDLE = Path(os.environ["CONTROLRT_CACHE"]) / "tests" / "demo-512x512"
CAN_EXPORT = importlib.util.find_spec("torch") is not None
FIRST = (
    "parity/test_diffusers.py",
    "parity/test_union.py",
    "parity/test_ip_adapter.py",
    "parity/test_checkpoint_files.py",
    "parity/test_tasks.py",
    "parity/test_sampler_pictures.py",
    "calibration/test_int8_build.py",
    "parity/test_precision.py",
    "demo/test_model.py",
    "engines/test_cuda_backend.py",
    "engines/test_build.py",
    "parity/test_openvino.py",
    "engines/tensorrt/test_bundle.py",
    "parity/test_samplers.py",
    "engines/test_cuda_bundle.py",
)
"""Test files that take long, those that trace a checkpoint before those that find its export in the cache: then no two
workers trace the same at once, and none is left with a long file at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed-to", type=Path, metavar="FILE", help="write the names of the tests that passed")
    parser.addoption("--not-again", type=Path, metavar="FILE", help="leave out those that such a file names")


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    # a core for each worker, which every library then takes for the whole machine
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    if CAN_EXPORT:
        import torch

        torch.set_grad_enabled(False)
    if worker is None and (file := config.getoption("--passed-to")) is not None:
        config.pluginmanager.register(Passed(file))


class Passed:
    """Notes which tests passed, those that workers ran among them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._outcomes: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._outcomes.setdefault(report.nodeid, set()).add(report.outcome)

    def pytest_sessionfinish(self) -> None:
        passed = [name for name, outcomes in self._outcomes.items() if outcomes == {"passed"}]
        self._file.write_text("".join(f"{name}\n" for name in passed), encoding="utf-8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(name) if (name := _file(item)) in FIRST else len(FIRST))
    if (file := config.getoption("--not-again")) is not None:
        passed = set(file.read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def _file(item: pytest.Item) -> str:
    return str(item.path.relative_to(Path(__file__).parent))


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    """The demo model's bundle. An environment that cannot export uses the one that the other environment built."""
    if CAN_EXPORT:
        from controlrt.demo import CONTROLNETS, MODEL_DIR
        from controlrt.engines.build import BuildOptions, build
        from controlrt.runtime.profile import ShapeProfile

        options = BuildOptions(
            model=str(MODEL_DIR),
            controlnets={name: str(path) for name, path in CONTROLNETS.items()},
            profile=ShapeProfile.parse("512x512", "1-4"),
            output=DEMO_BUNDLE,
        )
        build(options, "pytest")
    if not DEMO_BUNDLE.is_dir():
        pytest.fail(f"no bundle at {DEMO_BUNDLE}; run pytest in the development environment first (make test does)")
    return DEMO_BUNDLE


@pytest.fixture(scope="session")
def demo(demo_bundle: Path) -> Iterator[ControlNetPipeline]:
    """The demo bundle, loaded."""
    from controlrt.runtime import ControlNetPipeline

    with ControlNetPipeline.load(demo_bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """One of the small random checkpoints; parametrize it indirectly by name."""
    import families

    return getattr(families, request.param)(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def exported(family: Family) -> Path:
    """The directory of the family's export: the programs as traced, before any pass. It stays in the cache."""
    from controlrt.export.exporter import ExportOptions, export
    from controlrt.runtime.profile import ShapeProfile
    from families import SIDE

    return export(ExportOptions(**family.sources(), profile=ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-4")), "pytest").path
