"""A checkpoint of a published size with one ControlNet, its weights random but seeded.

    python -m controlrt.perf.random_model NAME DIRECTORY

writes a whole diffusers folder ``model`` and a ControlNet ``canny`` into DIRECTORY, with the tokenizers of the
published model. ``controlrt.perf.models`` runs this in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from controlrt.export.checkpoint.clip_tokenizer import END, clip_tokenizer
from controlrt.perf.model_sizes import SIZES, ModelSize

SEED = 0


def main() -> None:
    """Writes the checkpoint that the command line names into the directory that it names."""
    build(SIZES[sys.argv[1]], Path(sys.argv[2]))


def build(size: ModelSize, directory: Path) -> None:
    """Writes ``directory/model`` and ``directory/canny``."""
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    torch.set_default_dtype(getattr(torch, size.dtype))
    torch.manual_seed(SEED)
    unet = diffusers.UNet2DConditionModel(**size.unet)
    controlnet = diffusers.ControlNetModel.from_unet(unet, **size.controlnet)
    _fill_zero_convolutions(controlnet)
    controlnet.save_pretrained(directory / "canny")
    del controlnet
    tokenizer, text_config = _text(size.text_encoder)
    shared = {
        "vae": diffusers.AutoencoderKL(**size.vae),
        "text_encoder": transformers.CLIPTextModel(text_config),
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": diffusers.DDIMScheduler(**size.scheduler),
        "feature_extractor": None,
    }
    if size.text_encoder_2 is None:
        pipeline = diffusers.StableDiffusionPipeline(**shared, safety_checker=None, requires_safety_checker=False)
    else:
        tokenizer_2, config = _text(size.text_encoder_2)
        pipeline = diffusers.StableDiffusionXLPipeline(
            **shared,
            text_encoder_2=transformers.CLIPTextModelWithProjection(config),
            tokenizer_2=tokenizer_2,
            add_watermarker=False,
        )
    pipeline.save_pretrained(directory / "model")


def _text(config: dict[str, Any]) -> tuple[Any, Any]:
    """The tokenizer of a text encoder, and its config: OpenCLIP's encoders, of which GELU tells, pad with "!"."""
    tokenizer = clip_tokenizer("!" if config["hidden_act"] == "gelu" else END)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tokenizer, transformers.CLIPTextConfig(**config, **ids)


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
