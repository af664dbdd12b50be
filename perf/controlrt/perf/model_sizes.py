"""Published architectures, to be filled with random weights: speed does not look at them.

Configs are those of ``stable-diffusion-v1-5``, ``stable-diffusion-2-1`` (768-v) and ``stable-diffusion-xl-base-1.0``,
and of their Canny ControlNets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
OPEN_CLIP_H: dict[str, Any] = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
OPEN_CLIP_BIG_G: dict[str, Any] = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Configs of one model's parts, as diffusers' and transformers' classes take them."""

    title: str
    disk_gb: int
    """What the checkpoint takes, about."""
    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any] | None = None
    """With a projection; Stable Diffusion XL alone has it."""
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    controlnet: dict[str, Any]
    """What a ControlNet has beside the UNet's own config."""
    dtype: str = "float32"
    """Of the files. The largest model has float16, so that 16 GB are enough to make it."""


_CONTROLNET: dict[str, Any] = {"conditioning_embedding_out_channels": (16, 32, 96, 256)}

SIZES: dict[str, ModelSize] = {
    "sd15": ModelSize(
        title="Stable Diffusion 1.5",
        disk_gb=6,
        unet={
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
        },
        text_encoder=CLIP_L,
        vae=VAE,
        scheduler=SCHEDULER,
        controlnet=_CONTROLNET,
    ),
    "sd21": ModelSize(
        title="Stable Diffusion 2.1",
        disk_gb=7,
        unet={
            "sample_size": 96,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        text_encoder=OPEN_CLIP_H,
        vae={**VAE, "sample_size": 768},
        scheduler={**SCHEDULER, "prediction_type": "v_prediction"},
        controlnet=_CONTROLNET,
    ),
    "sdxl": ModelSize(
        title="Stable Diffusion XL",
        disk_gb=10,
        unet={
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "layers_per_block": 2,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        text_encoder=CLIP_L,
        text_encoder_2=OPEN_CLIP_BIG_G,
        vae={**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        scheduler=SCHEDULER,
        controlnet=_CONTROLNET,
        dtype="float16",
    ),
}
"""By the name that --model takes."""
