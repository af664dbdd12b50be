"""The models: their sizes against the published ones, counted without making weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from controlrt.perf.model_sizes import SIZES
from controlrt.perf.models import prepare_model
from controlrt.perf.random_model import build

PUBLISHED = {
    "sd15": {"unet": 859_520_964, "controlnet": 361_279_120, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
"""Parameters of the checkpoints of these names on the hub, and of control_v11p_sd15_canny."""


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", list(SIZES))
def test_models_have_the_published_sizes(name: str) -> None:
    size = SIZES[name]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**size.unet)
        models: dict[str, Any] = {
            "unet": unet,
            "controlnet": diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False, **size.controlnet),
            "vae": diffusers.AutoencoderKL(**size.vae),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**size.text_encoder)),
        }
        if size.text_encoder_2 is not None:
            config = transformers.CLIPTextConfig(**size.text_encoder_2)
            models["text_encoder_2"] = transformers.CLIPTextModelWithProjection(config)
    assert {part: parameters(models[part]) for part in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", list(SIZES))
def test_a_random_model_is_a_whole_checkpoint_of_its_kind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small here: what makes it the model it is stays."""
    monkeypatch.setattr(torch, "set_default_dtype", lambda _: None)  # it holds for the whole process
    size = SIZES[name]
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    levels = len(size.unet["block_out_channels"])
    width = 32 if size.text_encoder_2 is None else 64
    small = {"block_out_channels": (32, 64, 64, 64)[:levels], "attention_head_dim": 4, "norm_num_groups": 8}
    small |= {"cross_attention_dim": width, "layers_per_block": 1}
    second = None
    if size.text_encoder_2 is not None:
        small |= {"transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": 256 * 6 + 32}
        second = {**size.text_encoder_2, **text, "projection_dim": 32}
    build(
        dataclasses.replace(
            size,
            unet={**size.unet, **small},
            text_encoder={**size.text_encoder, **text},
            text_encoder_2=second,
            vae={**size.vae, "block_out_channels": (16, 16, 16, 16), "norm_num_groups": 8},
            controlnet={"conditioning_embedding_out_channels": (8, 8, 16, 16)},
        ),
        tmp_path,
    )
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(tmp_path / "model", local_files_only=True)
    assert ("XL" in type(pipeline).__name__) == (name == "sdxl")
    assert pipeline.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert pipeline.tokenizer.pad_token == ("!" if name == "sd21" else "<|endoftext|>")
    if name == "sdxl":
        assert pipeline.tokenizer_2.pad_token == "!"
    assert (pipeline.scheduler.config.prediction_type == "v_prediction") == (name == "sd21")
    controlnet = diffusers.ControlNetModel.from_pretrained(tmp_path / "canny")
    assert all(parameter.any() for block in controlnet.controlnet_down_blocks for parameter in block.parameters())


def test_weight_bytes_are_those_of_float32() -> None:
    model = prepare_model("demo")
    unet = diffusers.UNet2DConditionModel.from_pretrained(model.model, subfolder="unet")
    vae = diffusers.AutoencoderKL.from_pretrained(model.model, subfolder="vae")
    encoder = transformers.CLIPTextModel.from_pretrained(model.model, subfolder="text_encoder")
    controlnet = diffusers.ControlNetModel.from_pretrained(model.controlnet)
    assert model.weight_bytes == 4 * (parameters(unet) + parameters(controlnet))
    whole = 4 * sum(map(parameters, (unet, vae, encoder, controlnet)))
    assert model.float32_bytes(["canny"]) == pytest.approx(whole, rel=0.001)
    assert len(model.files(["canny", "mask"])) == 5
