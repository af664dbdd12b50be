"""T2I-Adapters: loaded as they are, and refused where their features would not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file, save_file

from controlrt.export import checkpoint
from controlrt.export.exporter import ExportOptions
from controlrt.runtime.errors import ParameterError, SourceError
from controlrt.runtime.profile import ShapeProfile
from families import Family

pytestmark = pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")


def test_an_adapter_is_loaded_as_it_is(family: Family) -> None:
    loaded = checkpoint.load(family.model, {}, adapters=family.adapters)
    for name, path in family.adapters.items():
        hint = torch.rand(1, loaded.adapters[name].config.in_channels, 128, 128)
        expected = T2IAdapter.from_pretrained(path)(hint)
        for found, wanted in zip(loaded.adapters[name](hint), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"adapter_type": "full_adapter_xl", "downscale_factor": 16}, "was made for SDXL, but the model is not"),
        (
            {"channels": (32, 64, 64, 64)},
            "features are 32 channels at 1/1, 64 channels at 1/2, .* the UNet takes 32 channels at 1/1, 32 channels",
        ),
        ({"downscale_factor": 16}, "features are 32 channels at 1/2, .* the UNet takes 32 channels at 1/1"),
    ],
)
def test_an_adapter_of_another_model(family: Family, tmp_path: Path, config: dict[str, object], says: str) -> None:
    settings = {"channels": (32, 32, 64, 64), "num_res_blocks": 1, "adapter_type": "full_adapter", **config}
    T2IAdapter(**settings).save_pretrained(tmp_path / "other")
    with pytest.raises(SourceError, match=rf"adapter depth .*{says}"):
        checkpoint.load(family.model, {}, adapters={"depth": tmp_path / "other"})


def test_what_is_no_adapter(family: Family, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"adapter depth .* is a ControlNetModel; supported: T2IAdapter"):
        checkpoint.load(family.model, {}, adapters={"depth": family.controlnets["first"]})
    with pytest.raises(SourceError, match=r"ControlNet edges .* is a T2IAdapter; supported: ControlNetModel"):
        checkpoint.load(family.model, {"edges": family.adapters["depth"]})
    weights = tmp_path / "adapter.safetensors"
    tensors = load_file(family.adapters["depth"] / "diffusion_pytorch_model.safetensors")
    save_file(tensors, weights)
    with pytest.raises(SourceError, match=r"a T2I-Adapter.*--adapter"):
        checkpoint.load(family.model, {"edges": weights})


@pytest.mark.parametrize("layout", ["original", "module", "diffusers"])
@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter"])
def test_a_single_file(family: Family, tmp_path: Path, kind: str, layout: str) -> None:
    """The same features as the folder's, from a file in TencentARC's layout or in diffusers' own."""
    torch.manual_seed(3)
    channels = (32, 32, 64) if kind == "light_adapter" else (32, 32, 64, 64)
    adapter = T2IAdapter(in_channels=1, channels=channels, num_res_blocks=2, adapter_type=kind)
    tensors = adapter.state_dict() if layout == "diffusers" else original(adapter)
    if layout == "original":
        torch.save(tensors, file := tmp_path / "adapter.pth")
    else:
        prefix = "module." if layout == "module" else ""
        save_file({prefix + name: value for name, value in tensors.items()}, file := tmp_path / "adapter.safetensors")
    found = checkpoint.load(family.model, {}, adapters={"depth": file}).adapters["depth"]
    hint = torch.rand(1, 1, 128, 128)
    for one, other in zip(found(hint), adapter(hint), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def original(adapter: T2IAdapter) -> dict[str, torch.Tensor]:
    """TencentARC's names: ldm/modules/encoders/adapter.py, Adapter and Adapter_light."""
    names = {}
    for name in adapter.state_dict():
        block = re.fullmatch(r"adapter\.body\.(\d)\.resnets\.(\d)\.(.+)", name)
        if block is None:
            level = re.fullmatch(r"adapter\.body\.(\d)\.(in_conv.+)", name)
            one_list = level is not None and adapter.config.adapter_type == "full_adapter"
            names[name] = f"body.{2 * int(level[1])}.{level[2]}" if one_list else name.removeprefix("adapter.")
        elif adapter.config.adapter_type == "light_adapter":
            names[name] = f"body.{block[1]}.body.{block[2]}.{block[3]}"
        else:
            names[name] = f"body.{2 * int(block[1]) + int(block[2])}.{block[3]}"
    return {names[name]: value.clone() for name, value in adapter.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: {"conv_in.weight": torch.zeros(1)}, "is no T2I-Adapter: 1 tensors such as conv_in.weight"),
        (lambda t: {name: value for name, value in t.items() if not name.startswith("body.6")}, "another kind"),
        (lambda t: t | {"body.0.block3.weight": torch.zeros(1)}, "has 1 tensors that a T2I-Adapter has not"),
        (lambda t: {name: value for name, value in t.items() if name != "body.1.block1.bias"}, "lacks 1 of"),
    ],
)
def test_a_file_that_is_no_adapter(family: Family, tmp_path: Path, change: Any, says: str) -> None:
    adapter = T2IAdapter(channels=(32, 32, 64, 64), num_res_blocks=2)
    save_file(change(original(adapter)), tmp_path / "adapter.safetensors")
    with pytest.raises(SourceError, match=rf"adapter depth .*{says}"):
        checkpoint.load(family.model, {}, adapters={"depth": tmp_path / "adapter.safetensors"})


def test_adapters_that_do_not_add_up(family: Family, tmp_path: Path) -> None:
    T2IAdapter(channels=(32, 32), num_res_blocks=1).save_pretrained(tmp_path / "two")
    checkpoint.load(family.model, {}, adapters={"outer": tmp_path / "two"})
    with pytest.raises(SourceError, match=r"adapter outer's number of features is 2, .* supported: 4"):
        checkpoint.load(family.model, {}, adapters={"depth": family.adapters["depth"], "outer": tmp_path / "two"})


def test_a_name_is_of_one_control(family: Family) -> None:
    with pytest.raises(ParameterError, match="control name is 'depth'"):
        ExportOptions(
            model=str(family.model),
            controlnets={"depth": "a"},
            adapters={"depth": "b"},
            profile=ShapeProfile.parse("128x128"),
        )
