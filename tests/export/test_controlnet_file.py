"""ControlNets in one file: the same weights as the folder, and what else is in files of that kind by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from original_layout import controlnet_tensors
from safetensors.torch import save_file

from controlrt.export import checkpoint
from controlrt.export.checkpoint.controlnet import load_controlnet
from controlrt.runtime.errors import SourceError
from families import FAMILIES, Family

WHOLE = {
    name: torch.zeros(1)
    for name in (
        "betas",
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    )
}
"""Tensors of Stable Diffusion, as they stand in ``control_sd15_canny.pth`` beside the ControlNet's."""
one_family = pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def unet(family: Family) -> Any:
    return UNet2DConditionModel.from_pretrained(family.model / "unet")


@pytest.mark.parametrize("family", list(FAMILIES), indirect=True, scope="module")
@pytest.mark.parametrize("layout", ["whole", "control_model", "bare", "diffusers"])
def test_the_same_weights_as_the_folder(family: Family, tmp_path: Path, layout: str) -> None:
    controlnet = ControlNetModel.from_pretrained(family.controlnets["first"])
    tensors = controlnet.state_dict() if layout == "diffusers" else controlnet_tensors(controlnet)
    if layout in ("whole", "control_model"):  # as published: all of the training run, or the ControlNet's part of it
        file = tmp_path / "control.pth"
        rest = WHOLE if layout == "whole" else {}
        torch.save(rest | {f"control_model.{name}": value for name, value in tensors.items()}, file)
    else:
        file = tmp_path / "control.safetensors"
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    loaded = checkpoint.load(family.model, {"edges": file})
    found = loaded.controlnets["edges"]
    for name, value in controlnet.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    added = {"text_embeds": torch.zeros(1, 48), "time_ids": torch.zeros(1, 6)} if loaded.time_ids else {}
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 7, loaded.unet.config.cross_attention_dim, generator=generator),
        "controlnet_cond": torch.rand(1, 3, 64, 64, generator=generator),
        "added_cond_kwargs": added,
        "return_dict": False,
    }
    (ours, middle), (theirs, their_middle) = found(**inputs), controlnet(**inputs)
    for one, other in zip((*ours, middle), (*theirs, their_middle), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", ["union"], indirect=True, scope="module")
def test_a_union(family: Family, tmp_path: Path) -> None:
    union = ControlNetUnionModel.from_pretrained(family.controlnets["union"])
    save_file(union.half().state_dict(), tmp_path / "promax.safetensors")
    found = checkpoint.load(family.model, {"union": tmp_path / "promax.safetensors"}).controlnets["union"]
    assert found.state_dict().keys() == union.state_dict().keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, union.state_dict()[name].float()), name
    for key in ("num_control_type", "num_trans_layer", "num_trans_channel", "num_proj_channel", "block_out_channels"):
        assert found.config[key] == union.config[key], key


@one_family
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t | {"lora_controlnet": torch.zeros(0)}, "is a Control-LoRA"),
        (lambda t: t | {"difference": torch.zeros(0)}, "is a difference file"),
        (lambda t: {f"control_model.{n}": v for n, v in t.items()} | {"difference": torch.zeros(0)}, "is a difference"),
        (lambda _: {"adapter.body.0.resnets.0.block1.weight": torch.zeros(1)}, "is a T2I-Adapter"),
        (lambda _: {"body.0.in_conv.weight": torch.zeros(1)}, "is a T2I-Adapter"),
        (lambda t: t | {"task_embedding": torch.zeros(6, 32)}, "is a ControlNet Union without transformer_layes.0"),
        (lambda t: t | {"down_blocks.0.ctrl_to_base.0.weight": torch.zeros(1)}, "is a ControlNet-XS"),
        (lambda _: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is a LoRA; merge it with --lora"),
        (lambda _: {"model.diffusion_model.out.2.bias": torch.zeros(1)}, "is a whole checkpoint; give it with --model"),
        (lambda _: {"x": torch.zeros(1)}, "is no ControlNet: 1 tensors such as x"),
        (lambda t: {n: v for n, v in t.items() if n != "zero_convs.3.0.bias"}, r"lacks 1 of .*down_blocks\.3\.bias"),
    ],
)
def test_refusals(family: Family, unet: Any, tmp_path: Path, change: Any, says: str) -> None:
    tensors = controlnet_tensors(ControlNetModel.from_pretrained(family.controlnets["first"]))
    save_file(change(tensors), tmp_path / "control.safetensors")
    with pytest.raises(SourceError, match=rf"ControlNet edges \(.*control\.safetensors\) {says}") as caught:
        load_controlnet("edges", tmp_path / "control.safetensors", unet)
    assert "\n" not in str(caught.value)


@one_family
def test_one_of_another_model(unet: Any, tmp_path: Path) -> None:
    other = FAMILIES["sd21"](tmp_path / "other")
    tensors = controlnet_tensors(ControlNetModel.from_pretrained(other.controlnets["first"]))
    save_file(tensors, tmp_path / "control.safetensors")
    with pytest.raises(SourceError, match=r"ControlNet edges .* (lacks|has) .* of the model's architecture"):
        load_controlnet("edges", tmp_path / "control.safetensors", unet)


@one_family
def test_what_is_known_of_hints(family: Family, tmp_path: Path) -> None:
    """Shuffle's residuals are averaged over the picture, which no tensor tells; channels show in the first one."""
    tensors = controlnet_tensors(ControlNetModel.from_pretrained(family.controlnets["first"]))
    shuffle = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    save_file(tensors, shuffle)
    assert checkpoint.load(family.model, {"edges": shuffle}).controlnets["edges"].config.global_pool_conditions
    tensors["input_hint_block.0.weight"] = torch.zeros(8, 6, 3, 3)
    save_file(tensors, tmp_path / "six.safetensors")
    with pytest.raises(SourceError, match="conditioning_channels is 6"):
        checkpoint.load(family.model, {"edges": tmp_path / "six.safetensors"})
