"""Programs with one part's weights in memory are those of the whole checkpoint."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ip_adapters import ip_adapter_tensors, save_image_encoder, save_ip_adapter
from original_layout import checkpoint_tensors, controlnet_tensors
from safetensors.torch import load_file, save_file

from controlrt.export import trace
from controlrt.export.checkpoint_programs import (
    CheckpointPrograms,
    load_checkpoint,
    program_specs,
    programs_of_part,
    tracing_bytes,
    weight_bytes,
)
from controlrt.export.exporter import ExportOptions, export, resolve_sources
from controlrt.export.programs import ProgramSpec
from controlrt.export.traced import program_keys
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.commands.lora_option import LoraOption
from controlrt.runtime.errors import SourceError
from controlrt.runtime.manifest import Program
from controlrt.runtime.profile import ShapeProfile
from families import Family, lora_tensors

TOOLS = {"torch": "2.13.0"}
PROFILE = ShapeProfile.parse("128x128")


def options_of(family: Family) -> ExportOptions:
    return ExportOptions(**family.sources(), profile=PROFILE)


@pytest.fixture
def options(family: Family) -> ExportOptions:
    return options_of(family)


def same_one_part_at_a_time(options: ExportOptions) -> None:
    """Every part by itself has weights and nothing else has, and is, by its digests, what it is in the whole."""
    sources = resolve_sources(options)
    whole = {spec.name: spec for spec in program_specs(load_checkpoint(options, sources), options.profile)}
    found: dict[str, ProgramSpec] = {}
    for part in dict.fromkeys(spec.part for spec in whole.values()):
        loaded = load_checkpoint(options, sources, only=(part,))
        others = [spec for spec in program_specs(loaded, options.profile) if spec.part != part]
        assert not any(holds_weights(spec) for spec in others if not spec.name.startswith("adapter."))
        found |= {spec.name: spec for spec in programs_of_part(options, sources, part)}
    assert found.keys() == whole.keys()
    for name, spec in found.items():
        assert not any(parameter.is_meta for parameter in spec.module.parameters())
        expected = program_keys(whole[name], options.profile, TOOLS)
        assert program_keys(spec, options.profile, TOOLS) == expected, name


def holds_weights(spec: ProgramSpec) -> bool:
    """An IP-Adapter's projection to tokens is small, and always read."""
    named = dict(spec.module.named_parameters())
    assert named
    return not all(each.is_meta for name, each in named.items() if not name.startswith("projection."))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "consistency", "union"], indirect=True, scope="module")
def test_folders(options: ExportOptions) -> None:
    same_one_part_at_a_time(options)


@pytest.mark.parametrize("family", ["shallow"], indirect=True, scope="module")
def test_folders_in_half_precision(family: Family, options: ExportOptions, tmp_path: Path) -> None:
    family.reference().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    same_one_part_at_a_time(replace(options, model=str(tmp_path)))


@pytest.mark.parametrize("family", ["sd15", "sdxl"], indirect=True, scope="module")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_files(family: Family, tmp_path: Path, suffix: str) -> None:
    model, controlnet = tmp_path / f"model{suffix}", tmp_path / f"controlnet{suffix}"
    pipeline = family.reference("first")
    for file, tensors in (
        (model, checkpoint_tensors(pipeline, family.name)),
        (controlnet, controlnet_tensors(pipeline.controlnet)),
    ):
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, file) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, file)
    config = shutil.copytree(family.model, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    same_one_part_at_a_time(
        ExportOptions(model=str(model), controlnets={"it": str(controlnet)}, config=str(config), profile=PROFILE)
    )


@pytest.mark.parametrize("family", ["shallow", "shallow_xl"], indirect=True, scope="module")
def test_loras_and_ip_adapters(family: Family, options: ExportOptions, tmp_path: Path) -> None:
    save_file(lora_tensors(family, "diffusers", seed=3), tmp_path / "lora.safetensors")
    save_image_encoder(tmp_path / "image_encoder")
    unet: Any = family.reference().unet
    adapters = {
        kind: str(save_ip_adapter(tmp_path / f"{kind}.safetensors", ip_adapter_tensors(unet, kind)))
        for kind in ("plain", "plus")
    }
    loras = (LoraOption(source=str(tmp_path / "lora.safetensors"), weight=0.7),)
    same_one_part_at_a_time(replace(options, loras=loras, ip_adapters=adapters))


@pytest.mark.parametrize("family", ["shallow"], indirect=True, scope="module")
def test_memory_decides_what_is_loaded(options: ExportOptions, capsys: pytest.CaptureFixture[str]) -> None:
    sources = resolve_sources(options)
    ample = CheckpointPrograms(options, sources, 2**40)
    needed = tracing_bytes(weight_bytes(ample.specs), PROFILE)
    assert all(holds_weights(spec) for spec in ample.specs)
    assert ample.parts == ("text_encoder", "controlnet.first", "unet", "vae")
    assert [spec.name for spec in ample.of_part("vae")] == ["vae_decoder", "vae_encoder"]
    assert ample.of_part("unet")[0] is ample.specs[2]
    assert all(holds_weights(spec) for spec in CheckpointPrograms(options, sources, needed).specs)
    assert capsys.readouterr().err == ""
    tight = CheckpointPrograms(options, sources, needed - 1)
    assert not any(holds_weights(spec) for spec in tight.specs)
    assert "the whole checkpoint takes about 1.2 GiB of memory, of which there are 1.2: parts take turns" in (
        capsys.readouterr().err
    )
    assert tight.parts == ample.parts
    weights = [weakref.ref(next(tight.of_part(part)[0].module.parameters())) for part in tight.parts]
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4


@pytest.mark.parametrize("family", ["shallow"], indirect=True, scope="module")
@pytest.mark.parametrize(("memory", "held"), [(2**40, [1, 2, 3, 4, 4]), (0, [1, 1, 1, 1, 1])])
def test_an_export_holds_what_memory_holds(
    options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, held: list[int]
) -> None:
    """Of the parts that were traced so far, so many are in memory."""
    traced: list[weakref.ref[torch.Tensor]] = []
    found: list[int] = []

    def noted(spec: ProgramSpec, _: ShapeProfile, directory: Path) -> Program:
        weight = next(spec.module.parameters())
        assert not weight.is_meta
        traced.append(weakref.ref(weight))
        found.append(len({id(each()) for each in traced if each() is not None}))
        for ending in (".onnx", ".onnx.data"):
            (directory / f"{spec.name}{ending}").write_text(spec.name)
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

    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path))
    monkeypatch.setattr("controlrt.export.exporter.usable_cores", lambda: 2)  # one process traces
    monkeypatch.setattr("controlrt.export.exporter.available_memory", lambda: memory)
    monkeypatch.setattr(trace, "export_program", noted)
    programs = Bundle.open(export(options, "test").path, verify=True).manifest.programs
    assert [program.name for program in programs][2:] == ["unet", "vae_decoder", "vae_encoder"]
    assert found == held


@pytest.mark.parametrize("family", ["shallow"], indirect=True, scope="module")
def test_damage_is_found_before_anything_is_traced(
    family: Family, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the VAE is loaded last."""
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("controlrt.export.exporter.available_memory", lambda: 0)
    monkeypatch.setattr(trace, "export_program", lambda *_: pytest.fail("traced"))
    model = shutil.copytree(family.model, tmp_path / "model")
    file = next((model / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"vae lacks 1 tensors, such as decoder\.conv_out\.bias"):
        export(replace(options, model=str(model)), "test")
