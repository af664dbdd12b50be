"""The models: their sizes against those of Stable Diffusion 1.5, counted without making weights."""

from __future__ import annotations

import diffusers
import torch
import transformers

from controlrt.perf import sd15
from controlrt.perf.models import prepare_model

PUBLISHED = {"unet": 859_520_964, "controlnet": 361_279_120, "vae": 83_653_863, "text_encoder": 123_060_480}
"""Parameters of stable-diffusion-v1-5 and control_v11p_sd15_canny."""


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sd15_has_the_published_sizes() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**sd15.UNET)
        models = {
            "unet": unet,
            "controlnet": diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False, **sd15.CONTROLNET),
            "vae": diffusers.AutoencoderKL(**sd15.VAE),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**sd15.TEXT_ENCODER)),
        }
    assert {name: parameters(model) for name, model in models.items()} == PUBLISHED


def test_weight_bytes_are_those_of_float32() -> None:
    model = prepare_model("demo")
    unet = diffusers.UNet2DConditionModel.from_pretrained(model.model, subfolder="unet")
    controlnet = diffusers.ControlNetModel.from_pretrained(model.controlnet)
    assert model.weight_bytes == 4 * (parameters(unet) + parameters(controlnet))
