"""A checkpoint of Stable Diffusion 1.5's size with one ControlNet, its weights random: speed does not look at them.

    python -m controlrt.perf.sd15 DIRECTORY

writes a whole diffusers folder ``model`` and a ControlNet ``canny`` into DIRECTORY. The configs are those of
``stable-diffusion-v1-5`` and ``control_v11p_sd15_canny``; the tokenizer is the demo model's, whose token ids are
all below CLIP's 49,408. ``controlrt.perf.models`` runs this in a process of its own: it takes 6 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from controlrt.demo import MODEL_DIR

SEED = 0
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
CONTROLNET: dict[str, Any] = {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
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
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def main() -> None:
    """Writes the checkpoint into the directory that is named on the command line."""
    build(Path(sys.argv[1]))


def build(directory: Path) -> None:
    """Writes ``directory/model`` and ``directory/canny``."""
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    unet = diffusers.UNet2DConditionModel(**UNET)
    controlnet = diffusers.ControlNetModel.from_unet(unet, **CONTROLNET)
    _fill_zero_convolutions(controlnet)
    controlnet.save_pretrained(directory / "canny")
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_ENCODER, **ids)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory / "model")


def _fill_zero_convolutions(controlnet: Any) -> None:
    """Gives them values, so that every residual counts when outputs are compared."""
    zero = [
        *controlnet.controlnet_down_blocks,
        controlnet.controlnet_mid_block,
        controlnet.controlnet_cond_embedding.conv_out,
    ]
    for convolution in zero:
        torch.nn.init.normal_(convolution.weight, std=0.02)
        torch.nn.init.normal_(convolution.bias, std=0.02)


if __name__ == "__main__":
    main()
