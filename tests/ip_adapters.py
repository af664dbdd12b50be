"""Small random IP-Adapters and an image encoder for them, with the tensor names of the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from controlrt.demo.scenes import sample_scene

Kind = Literal["plain", "plus", "full"]
SIDE, WIDTH, EMBEDDING = 32, 48, 24
"""Of the image encoder: its picture's side, its hidden channels, its embedding's."""
ENCODER_TOKENS = 17
TOKENS = {"plain": 4, "plus": 6, "full": ENCODER_TOKENS}


def save_image_encoder(folder: Path, embedding: int = EMBEDDING) -> Path:
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=embedding,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        hidden_act="gelu",
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def ip_adapter_tensors(unet: Any, kind: Kind, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """``image_proj`` and ``ip_adapter``, for diffusers' ``load_ip_adapter``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float | None = None) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if std is None else std)

    channels = unet.config.cross_attention_dim
    norm = {"weight": 1 + normal(channels, std=0.1), "bias": normal(channels, std=0.1)}
    if kind == "plain":
        proj = {"proj.weight": normal(4 * channels, EMBEDDING), "proj.bias": normal(4 * channels, std=0.5)}
        proj |= {f"norm.{name}": value for name, value in norm.items()}
    elif kind == "full":
        proj = {"proj.0.weight": normal(WIDTH, WIDTH), "proj.0.bias": normal(WIDTH, std=0.5)}
        proj |= {"proj.2.weight": normal(channels, WIDTH), "proj.2.bias": normal(channels, std=0.5)}
        proj |= {f"proj.3.{name}": value for name, value in norm.items()}
    else:
        proj = _resampler(normal, channels) | {f"norm_out.{name}": value for name, value in norm.items()}
    attentions = {}
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for layer, name in enumerate(names):
        weight = unet.get_submodule(name.removesuffix(".processor")).to_k.weight
        for kind_of in "kv":
            attentions[f"{2 * layer + 1}.to_{kind_of}_ip.weight"] = normal(*weight.shape)
    return {"image_proj": proj, "ip_adapter": attentions}


def _resampler(normal: Any, channels: int, hidden: int = 64, depth: int = 4) -> dict[str, Tensor]:
    """IP-Adapter Plus's, whose heads are 64 wide."""
    found = {"latents": normal(1, TOKENS["plus"], hidden, std=1.0)}
    found |= {"proj_in.weight": normal(hidden, WIDTH), "proj_in.bias": normal(hidden, std=0.1)}
    found |= {"proj_out.weight": normal(channels, hidden), "proj_out.bias": normal(channels, std=0.1)}
    for layer in range(depth):
        attention, forward = f"layers.{layer}.0", f"layers.{layer}.1"
        for norm in (f"{attention}.norm1", f"{attention}.norm2", f"{forward}.0"):
            found |= {f"{norm}.weight": 1 + normal(hidden, std=0.1), f"{norm}.bias": normal(hidden, std=0.1)}
        found |= {f"{attention}.to_q.weight": normal(64, hidden), f"{attention}.to_kv.weight": normal(128, hidden)}
        found |= {f"{attention}.to_out.weight": normal(hidden, 64)}
        found |= {f"{forward}.1.weight": normal(4 * hidden, hidden), f"{forward}.3.weight": normal(hidden, 4 * hidden)}
    return found


def save_ip_adapter(file: Path, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """As .safetensors, or a pickle by the ending."""
    if file.suffix == ".safetensors":
        flat = {f"{group}.{name}": value.contiguous() for group, own in tensors.items() for name, value in own.items()}
        save_file(flat, file)
    else:
        torch.save(tensors, file)
    return file


def photo(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    """A picture that is no square."""
    scene = sample_scene(np.random.default_rng(seed)).render(96)
    return Image.fromarray(scene).resize((width, height))
