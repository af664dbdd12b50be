"""The demo model's networks: how they are built, and how they are saved as an ordinary diffusers folder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, T2IAdapter, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from controlrt.demo import MODEL_DIR
from controlrt.demo.scenes import HELD_OUT_SHAPES, sample_scene


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-level BPE tokenizer whose merges come from scene captions."""
    rng = np.random.default_rng(0)
    captions = [sample_scene(rng).prompt for _ in range(4000)] + [f"a {kind}" for kind in HELD_OUT_SHAPES]
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False),
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [char + "</w>" for char in alphabet]
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


def start_as_identity(model: nn.Module) -> None:
    """Zeroes the last convolution of every residual block: small networks learn several times faster so."""
    for name, module in model.named_modules():
        if name.endswith(".conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        sample_size=512,
        block_out_channels=(16, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    start_as_identity(vae)
    for name, module in vae.named_modules():
        if name.endswith(("samplers.0.conv", "conv_shortcut")):
            nn.init.dirac_(module.weight)
            module.weight.data += 0.02 * torch.randn_like(module.weight)
    vae.quant_conv.weight.data[4:] = 0
    vae.quant_conv.bias.data[4:] = -6  # log variance: nearly deterministic at first
    return vae


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    start_as_identity(unet)
    return unet


def build_adapter() -> T2IAdapter:
    """For the UNet's two outer levels, where diffusers adds features: after the level's own downsampling.

    Its convolutions start small, so that it changes little at first.
    """
    adapter = T2IAdapter(channels=[32, 64], num_res_blocks=2, downscale_factor=16, adapter_type="full_adapter")
    for name, module in adapter.named_modules():
        if name.endswith(("conv_in", "in_conv", "block2")):
            module.weight.data *= 0.1
            nn.init.zeros_(module.bias)
    return adapter


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Noisier at the end than SD 1.5, so that pure noise carries no trace of the mean colour."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def save_half(module: nn.Module, folder: Path) -> None:
    """Writes float16 weights and the config, which names no path of the machine that trained it."""
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(module).half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_model(vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
    """Writes an ordinary diffusers folder in float16, without a safety checker."""
    for part, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
        save_half(module, MODEL_DIR / part)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(MODEL_DIR / "tokenizer")
    tokenizer.backend_tokenizer.model.save(str(MODEL_DIR / "tokenizer"))  # vocab.json and merges.txt, CLIP's own format
    build_scheduler().save_pretrained(MODEL_DIR / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (MODEL_DIR / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
