"""An export traces what is new, and takes what was traced before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from controlrt.export import trace
from controlrt.export.checkpoint_programs import load_checkpoint, program_specs
from controlrt.export.exporter import ExportOptions, export, resolve_sources
from controlrt.export.programs import ProgramSpec
from controlrt.export.traced import program_keys
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.manifest import Program
from controlrt.runtime.profile import ShapeProfile

TOOLS = {"torch": "2.13.0"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    family = families.sd15(tmp_path_factory.mktemp("sd15"))
    controlnets = {"first": str(family.controlnets["first"])}
    return ExportOptions(model=str(family.model), controlnets=controlnets, profile=ShapeProfile.parse("128x128"))


def specs_of(options: ExportOptions) -> list[ProgramSpec]:
    return program_specs(load_checkpoint(options, resolve_sources(options)), options.profile)


def keys_of(options: ExportOptions) -> dict[str, str]:
    return {spec.name: program_keys(spec, options.profile, TOOLS).program for spec in specs_of(options)}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in after if before.get(name) != after[name]}


@pytest.fixture(scope="module")
def keys(options: ExportOptions) -> dict[str, str]:
    return keys_of(options)


def test_keys_are_those_of_the_content(options: ExportOptions, keys: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(options.model, tmp_path / "elsewhere")
    assert keys_of(replace(options, model=str(tmp_path / "elsewhere"))) == keys
    assert len(set(keys.values())) == len(keys) == 5


def test_another_profile_is_another_program(options: ExportOptions, keys: dict[str, str]) -> None:
    wider = replace(options, profile=ShapeProfile.parse("192x128"))
    assert changed(keys, keys_of(wider)) == set(keys)
    more = replace(options, profile=ShapeProfile.parse("128x128", "1-4"))
    assert keys_of(more) == keys  # any batch is traced


def test_an_adapter_changes_the_unet_alone(options: ExportOptions, keys: dict[str, str]) -> None:
    adapter = Path(options.model).parent / "sketch"
    more = keys_of(replace(options, adapters={"sketch": str(adapter)}))
    assert changed(keys, more) == {"unet", "adapter.sketch"}


def _weight(module: torch.nn.Module) -> None:
    next(parameter for parameter in module.parameters() if parameter.dim() > 1).view(-1)[3] += 1e-3


def _epsilon(module: torch.nn.Module) -> None:
    norm = next(each for each in module.modules() if isinstance(each, torch.nn.GroupNorm))
    norm.eps = 2 * norm.eps


def _activation(module: torch.nn.Module) -> None:
    parent = next(each for each in module.modules() if isinstance(getattr(each, "nonlinearity", None), torch.nn.SiLU))
    parent.nonlinearity = torch.nn.GELU()


@pytest.mark.parametrize("change", [_weight, _epsilon, _activation])
def test_nothing_of_a_module_is_overlooked(options: ExportOptions, keys: dict[str, str], change: Any) -> None:
    spec = next(spec for spec in specs_of(options) if spec.name == "unet")
    assert program_keys(spec, options.profile, TOOLS).program == keys["unet"]
    assert program_keys(spec, options.profile, {"torch": "2.14.0"}).program != keys["unet"]
    change(spec.module)
    assert program_keys(spec, options.profile, TOOLS).program != keys["unet"]


def test_where_a_config_came_from_is_overlooked(options: ExportOptions, keys: dict[str, str]) -> None:
    """diffusers notes what a file left out in the order of a set, which differs from process to process."""
    spec = next(spec for spec in specs_of(options) if spec.name == "unet")
    configs = [module.config for module in spec.module.modules() if hasattr(module, "config")]
    noted = [config["_use_default_values"] for config in configs if "_use_default_values" in config]
    assert noted
    for names in noted:
        names.append("something else")
    assert program_keys(spec, options.profile, TOOLS).program == keys["unet"]


def test_what_a_function_holds_is_part_of_it(options: ExportOptions, keys: dict[str, str]) -> None:
    spec = next(spec for spec in specs_of(options) if spec.name == "unet")

    def hooked(factor: float | None) -> str:
        if factor is not None:
            held = factor
        spec.module.hook = lambda value: value * held  # with None it holds nothing yet
        return program_keys(spec, options.profile, TOOLS).program

    assert hooked(2.0) == hooked(2.0)
    assert len({hooked(2.0), hooked(3.0), hooked(None), keys["unet"]}) == 4


class Tracer:
    """Writes a program's name instead of tracing it."""

    def __init__(self) -> None:
        self.traced: list[str] = []

    def __call__(self, spec: ProgramSpec, profile: ShapeProfile, directory: Path) -> Program:
        del profile
        self.traced.append(spec.name)
        for ending in (".onnx", ".onnx.data"):
            (directory / f"{spec.name}{ending}").write_text(f"{spec.name} {len(self.traced)}")
        return Program(
            name=spec.name,
            part=spec.name,
            stage=None,
            cost=None,
            file=f"programs/{spec.name}.onnx",
            inputs=(),
            outputs=spec.outputs,
            max_relative_error=0.0,
            export_seconds=0.0,
        )


@pytest.fixture
def tracer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracer:
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("controlrt.export.exporter.usable_cores", lambda: 2)  # one process traces
    made = Tracer()
    monkeypatch.setattr(trace, "export_program", made)
    return made


def test_an_export_traces_what_is_new(options: ExportOptions, tracer: Tracer) -> None:
    one = export(options, "test").path
    assert tracer.traced == [program.name for program in Bundle.open(one).manifest.programs]
    tracer.traced.clear()
    second = Path(options.model).parent / "second"
    more = export(replace(options, controlnets={**options.controlnets, "second": str(second)}), "test")
    assert not more.cached
    assert tracer.traced == ["controlnet.second"]
    manifest = Bundle.open(more.path, verify=True).manifest
    assert {program.name for program in manifest.programs} > {"unet", "controlnet.first", "controlnet.second"}
    files = [path / "programs" / "unet.onnx.data" for path in (one, more.path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [file.stat().st_nlink for file in files] == [1, 1]  # onnx-ir refuses links


def test_what_is_damaged_or_gone_is_traced_anew(options: ExportOptions, tracer: Tracer) -> None:
    one = export(options, "test").path
    tracer.traced.clear()
    (one / "programs" / "unet.onnx.data").write_text("damaged")
    (one / "programs" / "vae_encoder.onnx").unlink()
    assert not export(options, "test").cached
    assert tracer.traced == ["unet", "vae_encoder"]
    assert export(options, "test").cached
