"""Programs traced in processes of their own are those that one process traces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import onnx
import pytest

import families
from controlrt.export import beside
from controlrt.export.beside import processes_for, trace_beside
from controlrt.export.checkpoint_programs import load_checkpoint, program_specs, tracing_bytes, weight_bytes
from controlrt.export.exporter import ExportOptions, resolve_sources
from controlrt.export.trace import export_program
from controlrt.runtime.errors import BuildError
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import Progress


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    family = families.shallow(tmp_path_factory.mktemp("shallow"))
    controlnets = {"first": str(family.controlnets["first"])}
    return ExportOptions(model=str(family.model), controlnets=controlnets, profile=ShapeProfile.parse("128x128"))


def test_they_are_those_that_one_process_traces(options: ExportOptions, tmp_path: Path) -> None:
    sources = resolve_sources(options)
    specs = program_specs(load_checkpoint(options, sources), options.profile)
    assert [spec.name for spec in specs][-3:] == ["unet", "vae_decoder", "vae_encoder"]
    few = [spec for spec in specs if spec.name in ("vae_decoder", "text_encoder")]
    (tmp_path / "beside").mkdir()
    (tmp_path / "alone").mkdir()
    with Progress("export", 3) as progress:
        found = trace_beside(options, sources, few, tmp_path / "beside", 2, progress)
    expected = [export_program(spec, options.profile, tmp_path / "alone") for spec in few]
    assert len(found) == len(expected)
    for theirs in expected:
        ours = found[theirs.name]
        same = {"export_seconds": 0.0, "max_relative_error": 0.0, "file": ""}
        assert msgspec.structs.replace(ours, **same) == msgspec.structs.replace(theirs, **same)
        files = [tmp_path / folder / f"{ours.name}.onnx" for folder in ("beside", "alone")]
        graphs = [onnx.load(file, load_external_data=False).graph for file in files]
        assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]
        assert files[0].with_suffix(".onnx.data").read_bytes() == files[1].with_suffix(".onnx.data").read_bytes()


def test_one_that_is_killed_is_an_error(
    options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "_trace", _killed)
    sources = resolve_sources(options)
    specs = program_specs(load_checkpoint(options, sources), options.profile)[:1]
    with (
        Progress("export", 2) as progress,
        pytest.raises(BuildError, match="a process that traces text_encoder was killed; was there enough memory"),
    ):
        trace_beside(options, sources, specs, tmp_path, 1, progress)


def test_an_interruption_ends_all(options: ExportOptions, tmp_path: Path) -> None:
    """In a process of its own: what runs the tests takes interrupts for itself."""
    arguments = [options.model, options.controlnets["first"], str(tmp_path)]
    started = time.monotonic()
    command = [sys.executable, __file__, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-1:] == ["interrupted, 0 left"], done.stderr
    assert time.monotonic() - started < 120


def _interrupt_itself(model: str, controlnet: str, folder: str) -> None:
    """What ``test_an_interruption_ends_all`` runs."""
    beside._trace = _forever
    profile = ShapeProfile.parse("128x128")
    options = ExportOptions(model=model, controlnets={"first": controlnet}, profile=profile)
    sources = resolve_sources(options)
    specs = program_specs(load_checkpoint(options, sources), profile)[:2]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
    threading.Thread(target=_interrupt_once_they_run, daemon=True).start()
    try:
        with Progress("export", 3) as progress:
            trace_beside(options, sources, specs, Path(folder), 2, progress)
    except KeyboardInterrupt:
        print(f"interrupted, {len(beside.multiprocessing.active_children())} left")


@pytest.mark.parametrize(
    ("cores", "fitting", "processes"), [(2, 5, 1), (8, 5, 2), (16, 5, 4), (16, 3, 3), (16, 1, 1), (16, 0, 1)]
)
def test_processes_are_as_many_as_cores_and_memory_allow(
    options: ExportOptions, cores: int, fitting: int, processes: int
) -> None:
    specs = program_specs(load_checkpoint(options, resolve_sources(options)), options.profile)
    sizes = sorted((tracing_bytes(weight_bytes([spec]), options.profile) for spec in specs), reverse=True)
    assert processes_for(specs, options.profile, cores, sum(sizes[:fitting])) == processes


def _interrupt_once_they_run() -> None:
    while not beside.multiprocessing.active_children():
        time.sleep(0.1)
    time.sleep(5)  # until they are at it
    os.kill(os.getpid(), signal.SIGINT)


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _forever(*_: object) -> None:
    time.sleep(600)
    sys.exit("nobody ended it")


if __name__ == "__main__":
    _interrupt_itself(*sys.argv[1:])
