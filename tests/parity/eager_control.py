"""The denoising loop in eager PyTorch, spelled out, for what diffusers' pipelines do not offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True, kw_only=True)
class EagerControl:
    """One ControlNet of the loop."""

    model: Any
    picture: Image.Image
    scale: Tensor | None = None
    """(steps or 1, pictures or 1, layers or 1); 1 where None."""
    conditional: bool = False
    region: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class EagerAdapter:
    """One T2I-Adapter of the loop."""

    model: Any
    picture: Image.Image
    scale: float = 1.0
    until: float = 1.0
    """Fraction of the steps."""


def tensor(picture: Image.Image, channels: int = 3) -> Tensor:
    planes = np.asarray(picture.convert("RGB" if channels == 3 else "L"), np.float32) / 255
    return torch.from_numpy(planes.reshape(*planes.shape[:2], channels)).permute(2, 0, 1)[None]


def denoise(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    controls: Sequence[EagerControl] = (),
    adapters: Sequence[EagerAdapter] = (),
    side: int,
) -> NDArray[np.float32]:
    """Latents after the loop; ``pipeline`` lends text encoders, UNet and scheduler."""
    count = len(prompts)
    conditioning = _conditioning(pipeline, list(prompts), side)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn((count, 4, side // 8, side // 8), generator=generator) * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = torch.cat([scheduler.scale_model_input(latents, timestep)] * 2)
        down: list[Any] = [0.0] * 100
        middle: Any = 0.0
        for control in controls:
            hint = tensor(control.picture).repeat(2 * count, 1, 1, 1)
            own, own_middle = control.model(scaled, timestep, controlnet_cond=hint, return_dict=False, **conditioning)
            layers = [*own, own_middle]
            table = torch.ones(1, 1, 1) if control.scale is None else control.scale
            scale = table.float().expand(steps, count, len(layers))[step]
            rows = torch.cat([torch.zeros_like(scale) if control.conditional else scale, scale])
            weighed = []
            for layer, residual in enumerate(layers):
                value = residual * rows[:, layer, None, None, None]
                if control.region is not None:
                    region = torch.from_numpy(control.region)[None, None]
                    value = value * interpolate(region, residual.shape[2:], mode="bilinear", align_corners=False)
                weighed.append(value)
            down = [before + value for before, value in zip(down, weighed, strict=False)]
            middle = middle + weighed[-1]
            down = down[: len(layers) - 1]
        features = None
        active = [adapter for adapter in adapters if step < int(steps * adapter.until)]
        if active:
            sums = [
                sum(
                    adapter.scale * adapter.model(tensor(adapter.picture, adapter.model.config.in_channels))[level]
                    for adapter in active
                )
                for level in range(4)
            ]
            features = [value.repeat(2 * count, 1, 1, 1) for value in sums]  # type: ignore[union-attr]
        controlled = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        output = pipeline.unet(
            scaled,
            timestep,
            down_intrablock_additional_residuals=features,
            return_dict=False,
            **conditioning,
            **(controlled if controls else {}),
        )[0]
        unconditional, conditional = output.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return latents.numpy()


def _conditioning(pipeline: Any, prompts: list[str], side: int) -> dict[str, Any]:
    """What UNet and ControlNets read of the prompts, the unconditional rows first."""
    if not hasattr(pipeline, "text_encoder_2"):
        positive, negative = pipeline.encode_prompt(prompts, "cpu", 1, True)
        return {"encoder_hidden_states": torch.cat([negative, positive])}
    positive, negative, pooled, negative_pooled = pipeline.encode_prompt(prompts, device="cpu")
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)  # of the original, its crop, the target
    added = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": sizes.repeat(2 * len(prompts), 1)}
    return {"encoder_hidden_states": torch.cat([negative, positive]), "added_cond_kwargs": added}
