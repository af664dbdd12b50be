"""Which checkpoints are taken and which are refused, and with what words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from controlrt.export import checkpoint
from controlrt.export.modules import residual_shapes
from controlrt.runtime.errors import SourceError
from families import FAMILIES, Family


@pytest.fixture
def copy(family: Family, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family.model, tmp_path / "model"))


one_family = pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")


@pytest.mark.parametrize("family", list(FAMILIES), indirect=True, scope="module")
def test_residuals_are_those_of_diffusers(family: Family) -> None:
    loaded = checkpoint.load(family.model, family.controlnets)
    added = {"text_embeds": torch.zeros(1, 48), "time_ids": torch.zeros(1, 6)} if loaded.time_ids else {}
    found = residuals(loaded.controlnets["first"], added_cond_kwargs=added)
    assert residual_shapes(loaded.unet) == found
    assert len(found) == {"sd15": 13, "sd21": 5, "sdxl": 7}[family.name]


@pytest.mark.parametrize(("levels", "layers", "count"), [(4, 2, 13), (3, 2, 10), (4, 1, 9)])
def test_residuals_of_published_and_other_layouts(levels: int, layers: int, count: int) -> None:
    """Those of Stable Diffusion 1.x and 2.x, then those of XL."""
    controlnet = ControlNetModel(
        block_out_channels=(16, 32, 48, 64)[:levels],
        down_block_types=("DownBlock2D",) * levels,
        layers_per_block=layers,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 8, 16, 16),
    )
    found = residuals(controlnet)
    assert residual_shapes(controlnet) == found
    assert len(found) == count


def residuals(controlnet: ControlNetModel, **options: Any) -> list[tuple[int, int]]:
    """Channels, and by how much smaller than the latents, as diffusers computes them."""
    embeds = torch.zeros(1, 77, controlnet.config.cross_attention_dim)
    hint = torch.zeros(1, 3, 128, 128)
    down, middle = controlnet(torch.zeros(1, 4, 16, 16), 5, embeds, hint, return_dict=False, **options)
    return [(residual.shape[1], 16 // residual.shape[2]) for residual in (*down, middle)]


@one_family
def test_half_precision_files_are_found(family: Family, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(family.model, safety_checker=None).to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    loaded = checkpoint.load(tmp_path / "half", {})
    exact = checkpoint.load(family.model, {})
    assert loaded.unet.dtype == torch.float32
    for half, full in zip(loaded.unet.parameters(), exact.unet.parameters(), strict=True):
        assert torch.equal(half, full.half().float())


@one_family
def test_parts_that_a_download_leaves_out(copy: Path) -> None:
    """SD 1.5 on the hub names a safety checker and a feature extractor; neither is downloaded or needed."""
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert checkpoint.load(copy, {}).text_encoders[0].max_length == 77


@one_family
@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("model/unet", {"class_embed_type": "identity"}, "the UNet's class_embed_type is identity"),
        ("first", {"_class_name": "ControlNetXSAdapter"}, "is a ControlNetXSAdapter; supported: ControlNetModel and"),
        ("first", {"class_embed_type": "identity"}, "edges.s class_embed_type is identity"),
        ("first", {"layers_per_block": 1}, "layers_per_block is 1, the UNet has 2"),
        ("model", {"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
    ],
)
def test_what_would_draw_another_picture_is_refused(
    family: Family, tmp_path: Path, part: str, change: dict[str, Any], says: str
) -> None:
    copy = Path(shutil.copytree(family.model.parent, tmp_path / "copy"))
    config = copy / part / ("model_index.json" if part == "model" else "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(SourceError, match=says):
        checkpoint.load(copy / "model", {"edges": copy / "first"})


@one_family
@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("unet", "conv_in.bias"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "text_model.final_layer_norm.weight"),
    ],
)
def test_a_pipeline_that_lacks_tensors(family: Family, tmp_path: Path, part: str, tensor: str) -> None:
    """diffusers would fill them with random values and warn."""
    copy = Path(shutil.copytree(family.model, tmp_path / "copy"))
    (weights,) = (copy / part).glob("*.safetensors")
    tensors = load_file(weights)
    last = tensor.removeprefix("text_model.")
    name = tensor if tensor in tensors else last
    del tensors[name]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(SourceError, match=rf"copy/{part} lacks 1 tensors, such as .*{last}"):
        checkpoint.load(copy, {})


@one_family
def test_a_controlnet_that_lacks_tensors(family: Family, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(family.controlnets["first"], tmp_path / "copy"))
    weights = copy / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["controlnet_mid_block.bias"]
    save_file(tensors, weights)
    with pytest.raises(SourceError, match=r"lacks 1 tensors, such as controlnet_mid_block\.bias"):
        checkpoint.load(family.model, {"edges": copy})


@one_family
def test_a_controlnet_of_another_model_is_refused(family: Family, tmp_path: Path) -> None:
    other = FAMILIES["sd21"](tmp_path / "other")
    with pytest.raises(SourceError, match=r"ControlNet edges .* cross_attention_dim is 48, the UNet has 32"):
        checkpoint.load(family.model, {"edges": other.controlnets["first"]})


@one_family
def test_damage_is_one_line(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SourceError, match="cannot load") as caught:
        checkpoint.load(copy, {})
    assert "\n" not in str(caught.value)


@one_family
def test_what_is_no_pipeline(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="model_index"):
        checkpoint.load(copy / "unet", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no diffusers folder"):
        checkpoint.digest_files(tmp_path / "empty")
    with pytest.raises(SourceError, match="does not exist"):
        checkpoint.resolve(str(tmp_path / "absent"), "model")


@one_family
def test_digests_see_every_change(copy: Path) -> None:
    before = checkpoint.digest_files(copy)
    assert "unet/diffusion_pytorch_model.safetensors" in before
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.02"))
    assert checkpoint.digest_files(copy) != before
