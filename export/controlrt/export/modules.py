"""The PyTorch modules that are traced: diffusers' models with flat inputs and outputs.

Shapes: ``batch`` counts pictures, ``rows`` counts rows of the model's batch (two per picture with guidance); ``rows``
the input says which picture each row belongs to. The input scaling, the guidance and the sampler's update are part
of the UNet program, so a step is program launches and nothing else.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn


class UNetStep(nn.Module):
    """One denoising step after the ControlNets: scaled UNet, guidance, sampler update.

    The update is the sampler table's row (``controlrt.runtime.samplers``): any sampler is one matrix over the latents,
    a short history, the guided output, noise, and the predicted picture clamped to a range.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latents: Tensor,
        rows: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        prompt_embeds: Tensor,
        added: dict[str, Tensor],
        residuals: list[Tensor],
        guidance: Tensor,
        history: Tensor,
        noise: Tensor,
        update: Tensor,
        clip: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Latents and history after the step.

        Args:
            latents: (batch, channels, height/8, width/8).
            rows: (rows,), int64; the picture of each row.
            timestep, input_scale: (batch,).
            prompt_embeds: (rows, tokens, channels).
            added: SDXL's ``text_embeds`` (rows, channels) and ``time_ids`` (rows, 6); empty otherwise.
            residuals: one per skip connection and one for the middle block, added where ControlNet adds them.
            guidance: (batch, rows); the guided output is this matrix times the model's output.
            history: (batch, slots, channels, height/8, width/8); what the sampler keeps from step to step.
            noise: as latents; standard normal, or zero.
            update: (batch, 1 + slots, columns); next latents and history from latents, history, output, noise, clipped.
            clip: (batch, 3); clipped = clamp(c[0] * latents + c[1] * output, -c[2], c[2]).
        """
        sample = (latents * _per_picture(input_scale)).index_select(0, rows)
        output = self.unet(
            sample,
            timestep.index_select(0, rows),
            prompt_embeds,
            added_cond_kwargs=added or None,
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )[0]
        guided = (guidance @ output.flatten(1)).view_as(latents)
        predicted = _per_picture(clip[:, 0]) * latents + _per_picture(clip[:, 1]) * guided
        limit = _per_picture(clip[:, 2])
        clipped = torch.minimum(torch.maximum(predicted, -limit), limit)
        seen = torch.cat([latents[:, None], history, guided[:, None], noise[:, None], clipped[:, None]], dim=1)
        following = (update @ seen.flatten(2)).unflatten(2, latents.shape[1:])
        return following[:, 0], following[:, 1:]


class ControlNetStep(nn.Module):
    """One ControlNet: its scaled residuals added to those of the ControlNets before it."""

    def __init__(self, controlnet: ControlNetModel) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(
        self,
        latents: Tensor,
        rows: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        prompt_embeds: Tensor,
        added: dict[str, Tensor],
        hint: Tensor,
        conditioning_scale: Tensor,
        residuals: list[Tensor],
    ) -> list[Tensor]:
        """Residuals so far plus this ControlNet's, each times its row's and layer's scale.

        Args:
            latents, rows, timestep, input_scale, prompt_embeds, added: as in UNetStep.
            hint: (batch, 3, height, width), in [0, 1].
            conditioning_scale: (rows, layers).
            residuals: the sum so far, as many as layers.
        """
        sample = (latents * _per_picture(input_scale)).index_select(0, rows)
        down, middle = self.controlnet(
            sample,
            timestep.index_select(0, rows),
            prompt_embeds,
            controlnet_cond=hint.index_select(0, rows),
            added_cond_kwargs=added or None,
            return_dict=False,
        )
        return [
            before + own * conditioning_scale[:, layer, None, None, None]
            for layer, (before, own) in enumerate(zip(residuals, [*down, middle], strict=True))
        ]


class TextEncoderProgram(nn.Module):
    """A CLIP text encoder (Radford et al. 2021): token ids to prompt embeddings, and the pooled output for SDXL."""

    def __init__(self, text_encoder: nn.Module, *, penultimate: bool, pooled: bool) -> None:
        super().__init__()
        self.text_encoder, self.penultimate, self.pooled = text_encoder, penultimate, pooled

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Embeddings (batch, tokens, channels), and with ``pooled`` (batch, channels)."""
        outputs = self.text_encoder(input_ids, output_hidden_states=self.penultimate, return_dict=True)
        embeds = outputs.hidden_states[-2] if self.penultimate else outputs.last_hidden_state
        return (embeds, outputs.text_embeds) if self.pooled else (embeds,)


class VaeDecoderProgram(nn.Module):
    """Latents to pictures in [0, 1], channels last."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.shift = vae.config.shift_factor or 0.0

    def forward(self, latents: Tensor) -> Tensor:
        """(batch, channels, height/8, width/8) to (batch, height, width, 3)."""
        picture = self.vae.decode(latents / self.vae.config.scaling_factor + self.shift, return_dict=False)[0]
        return (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


class VaeEncoderProgram(nn.Module):
    """Pictures to the mean and standard deviation of their scaled latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.shift = vae.config.shift_factor or 0.0

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, height, width, 3) in [0, 1] to two of (batch, channels, height/8, width/8)."""
        posterior = self.vae.encode(picture.permute(0, 3, 1, 2) * 2 - 1, return_dict=False)[0]
        scale = self.vae.config.scaling_factor
        return (posterior.mean - self.shift) * scale, posterior.std * scale


def _per_picture(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def residual_shapes(unet: UNet2DConditionModel) -> list[tuple[int, int]]:
    """(channels, downscale against the latents) of each residual, skip connections first and the middle block last."""
    channels = unet.config.block_out_channels
    layers = unet.config.layers_per_block
    per_block = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    shapes, scale = [(channels[0], 1)], 1
    for block, width in enumerate(channels):
        shapes += [(width, scale)] * per_block[block]
        if block < len(channels) - 1:
            scale *= 2
            shapes.append((width, scale))
    return [*shapes, (channels[-1], scale)]
