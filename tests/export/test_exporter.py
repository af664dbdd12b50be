"""What makes an export another one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from controlrt.demo import MODEL_DIR
from controlrt.export.exporter import ExportOptions, export_key, resolve_sources
from controlrt.runtime.commands.lora_option import LoraOption
from controlrt.runtime.profile import ShapeProfile


@pytest.fixture
def options(tmp_path: Path) -> ExportOptions:
    save_file({"x": torch.zeros(1)}, tmp_path / "style.safetensors")
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    shutil.copytree(MODEL_DIR, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    return ExportOptions(
        model=str(tmp_path / "model.safetensors"),
        controlnets={},
        profile=ShapeProfile.parse("512x512", "1"),
        loras=(LoraOption(source=str(tmp_path / "style.safetensors"), weight=0.8),),
        config=str(tmp_path / "config"),
    )


def key(options: ExportOptions) -> str:
    return export_key(options, resolve_sources(options), {})


def test_the_key_covers_loras_and_configs(options: ExportOptions, tmp_path: Path) -> None:
    first = key(options)
    assert key(options) == first
    (lora,) = options.loras
    changed = {
        "weight": replace(options, loras=(replace(lora, weight=0.7),)),
        "count": replace(options, loras=(lora, lora)),
        "none": replace(options, loras=()),
        "no config": replace(options, config=None),
        "prediction": replace(options, prediction_type="v_prediction"),
    }
    keys = {what: key(one) for what, one in changed.items()}
    scheduler = tmp_path / "config" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + " ")
    keys["config"] = key(options)
    save_file({"x": torch.ones(1)}, tmp_path / "style.safetensors")
    keys["content"] = key(options)
    assert len({first, *keys.values()}) == 1 + len(keys)


def test_names_of_loras(tmp_path: Path, options: ExportOptions) -> None:
    """The file's own; of a file that every LoRA on the hub is called, its folder's; a number where one comes again."""
    folder = tmp_path / "watercolor"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")
    (lora,) = options.loras
    sources = resolve_sources(replace(options, loras=(lora, LoraOption(source=str(folder), weight=1.0), lora)))
    assert [each.name for each in sources.loras] == ["style", "watercolor", "style-2"]
