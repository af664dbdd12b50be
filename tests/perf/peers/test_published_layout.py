"""Names of tensors as they were published, against the layout's own description of its blocks."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from original_layout import controlnet_tensors
from safetensors.torch import load_file, save_file

from controlrt.perf.peers.published_layout import PublishedCheckpoint, published, write_controlnet, write_model
from controlrt.runtime.errors import ControlRTError

CONTROLNET = "controlnet/diffusion_pytorch_model.safetensors"


def small_controlnet() -> diffusers.ControlNetModel:
    """Of as many blocks as Stable Diffusion's, and of the width of its prompts."""
    torch.manual_seed(0)
    return diffusers.ControlNetModel(
        block_out_channels=(8, 16, 24, 24),
        attention_head_dim=2,
        cross_attention_dim=768,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8, 8, 16),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_controlnet_s_names(dtype: torch.dtype, tmp_path: Path) -> None:
    network = small_controlnet().to(dtype)
    network.save_pretrained(tmp_path / "diffusers")
    write_controlnet(tmp_path / "diffusers", tmp_path / "published.safetensors")
    found, expected = load_file(tmp_path / "published.safetensors"), controlnet_tensors(network)
    assert found.keys() == expected.keys()
    assert len(found) == len(network.state_dict())
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "name",
    [
        "add_embedding.linear_1.weight",
        "task_embedding",
        "up_blocks.0.resnets.0.norm1.bias",
        "up_blocks.0.upsamplers.0.conv.weight",
    ],
)
def test_another_network_s_tensor_is_refused(name: str) -> None:
    with pytest.raises(ControlRTError, match=f"{name} is no tensor"):
        published(name)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_s_names_are_those_before_transformers_5(prefix: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for part in ("unet", "text_encoder"):
        (source / part).mkdir(parents=True)
    (source / "model_index.json").write_text("{}")
    weight = torch.arange(6.0)
    save_file({f"{prefix}final_layer_norm.weight": weight}, source / "text_encoder" / "model.safetensors")
    write_model(source, target)
    found = load_file(target / "text_encoder" / "model.safetensors")
    assert list(found) == ["text_model.final_layer_norm.weight"]
    assert torch.equal(found["text_model.final_layer_norm.weight"], weight)
    assert (target / "unet").resolve() == (source / "unet").resolve()
    assert (target / "model_index.json").read_text() == "{}"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A model's and a ControlNet's, each with the files that are read."""
    small_controlnet().save_pretrained(tmp_path / "controlnet")
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        (tmp_path / "model" / part).mkdir(parents=True)
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text("{}")
    for part in ("unet", "vae"):
        save_file({"conv_in.bias": torch.zeros(1)}, tmp_path / "model" / part / "diffusion_pytorch_model.safetensors")
    save_file({"final_layer_norm.weight": torch.zeros(1)}, tmp_path / "model" / "text_encoder" / "model.safetensors")
    return tmp_path


def prepared(folders: Path) -> PublishedCheckpoint:
    return PublishedCheckpoint(folders / "model", folders / "controlnet", folders / "cache")


def test_a_checkpoint_is_written_once_and_anew_where_it_changed(folders: Path) -> None:
    first = prepared(folders)
    written = first.controlnet.stat().st_mtime_ns
    assert prepared(folders).controlnet == first.controlnet
    assert first.controlnet.stat().st_mtime_ns == written
    other = {name: tensor + 1 for name, tensor in load_file(folders / CONTROLNET).items()}
    save_file(other, folders / CONTROLNET)
    second = prepared(folders)
    assert second.controlnet != first.controlnet
    bias = "input_blocks.0.0.bias"
    assert torch.equal(load_file(second.controlnet)[bias], load_file(first.controlnet)[bias] + 1)
    assert (second.model / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(
    "missing",
    [
        CONTROLNET,
        "controlnet/config.json",
        "model/unet/diffusion_pytorch_model.safetensors",
        "model/text_encoder/model.safetensors",
        "model/scheduler/scheduler_config.json",
    ],
)
def test_what_is_missing_is_named(folders: Path, missing: str) -> None:
    (folders / missing).unlink()
    with pytest.raises(ControlRTError, match=f"diffusers folders, and .*{missing} is not there"):
        prepared(folders)
    assert not (folders / "cache").exists()


@pytest.mark.parametrize(
    "change", [{"cross_attention_dim": 1024}, {"block_out_channels": [8, 16]}, {"layers_per_block": 3}]
)
def test_another_architecture_is_refused(folders: Path, change: dict[str, object]) -> None:
    config = folders / "controlnet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ControlRTError, match=r"Stable Diffusion 1\.x, which this ControlNet is not for"):
        prepared(folders)
