"""A checkpoint of a published size with one ControlNet, its weights random but seeded.

    python -m controlrt.perf.random_model NAME DIRECTORY

writes a whole diffusers folder ``model`` and a ControlNet ``canny`` into DIRECTORY. The tokenizer is the demo model's,
whose token ids are all below CLIP's 49,408. ``controlrt.perf.models`` runs this in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from controlrt.demo import MODEL_DIR
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
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    unet = diffusers.UNet2DConditionModel(**size.unet)
    controlnet = diffusers.ControlNetModel.from_unet(unet, **size.controlnet)
    _fill_zero_convolutions(controlnet)
    controlnet.save_pretrained(directory / "canny")
    del controlnet
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shared = {
        "vae": diffusers.AutoencoderKL(**size.vae),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**size.text_encoder, **ids)),
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": diffusers.DDIMScheduler(**size.scheduler),
        "feature_extractor": None,
    }
    if size.text_encoder_2 is None:
        pipeline = diffusers.StableDiffusionPipeline(**shared, safety_checker=None, requires_safety_checker=False)
    else:
        config = transformers.CLIPTextConfig(**size.text_encoder_2, **ids)
        pipeline = diffusers.StableDiffusionXLPipeline(
            **shared,
            text_encoder_2=transformers.CLIPTextModelWithProjection(config),
            tokenizer_2=tokenizer,
            add_watermarker=False,
        )
    pipeline.save_pretrained(directory / "model")


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
