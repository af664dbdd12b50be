"""Names of tensors as they were published, against the layout's own description of its blocks."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from original_layout import controlnet_tensors
from safetensors.numpy import load_file, save_file

from controlrt.perf.peers.published_layout import published, write_controlnet, write_model


def test_a_controlnet_s_names(tmp_path: Path) -> None:
    """A small one, of as many blocks as Stable Diffusion's."""
    torch.manual_seed(0)
    network = diffusers.ControlNetModel(
        block_out_channels=(8, 16, 24, 24),
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8, 8, 16),
    )
    network.save_pretrained(tmp_path / "diffusers")
    write_controlnet(tmp_path / "diffusers", tmp_path / "published.safetensors")
    found, expected = load_file(tmp_path / "published.safetensors"), controlnet_tensors(network)
    assert found.keys() == expected.keys()
    assert len(found) == len(network.state_dict())
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[name].numpy(), err_msg=name)


@pytest.mark.parametrize(
    "name", ["add_embedding.linear_1.weight", "task_embedding", "up_blocks.0.resnets.0.norm1.bias"]
)
def test_another_network_s_tensor_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        published(name)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_s_names_are_those_before_transformers_5(prefix: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for part in ("unet", "text_encoder"):
        (source / part).mkdir(parents=True)
    (source / "model_index.json").write_text("{}")
    weight = np.arange(6, dtype=np.float32)
    save_file({f"{prefix}final_layer_norm.weight": weight}, source / "text_encoder" / "model.safetensors")
    write_model(source, target)
    found = load_file(target / "text_encoder" / "model.safetensors")
    assert list(found) == ["text_model.final_layer_norm.weight"]
    np.testing.assert_array_equal(found["text_model.final_layer_norm.weight"], weight)
    assert (target / "unet").resolve() == (source / "unet").resolve()
    assert (target / "model_index.json").read_text() == "{}"
