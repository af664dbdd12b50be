"""The PyTorch modules that are traced: diffusers' models with flat inputs and outputs.

Shapes: ``batch`` counts pictures, ``rows`` counts rows of the model's batch (two per picture with guidance); ``rows``
the input says which picture each row belongs to. The input scaling, the guidance and the sampler's update are part
of the UNet program, so a step is program launches and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn

SMALLEST_SPREAD = 1e-12
"""Below this a model's output counts as constant, and guidance rescale has nothing to restore."""


class UNetStep(nn.Module):
    """One denoising step after the ControlNets: scaled UNet, guidance, sampler update, what is known put back.

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
        added: dict[str, Any],
        residuals: list[Tensor],
        adapters: list[Tensor],
        ip_embeds: list[Tensor],
        ip_scale: list[Tensor],
        inpaint: list[Tensor],
        guidance: Tensor,
        conditional: Tensor,
        guidance_rescale: Tensor,
        history: Tensor,
        noise: Tensor,
        update: Tensor,
        clip: Tensor,
        mask: Tensor,
        known: Tensor,
        blend: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Latents and history after the step.

        Args:
            latents: (batch, channels, height/8, width/8).
            rows: (rows,), int64; the picture of each row.
            timestep, input_scale: (batch,).
            prompt_embeds: (rows, tokens, channels).
            added: SDXL's ``text_embeds`` (rows, channels) and ``time_ids`` (rows, 6); empty otherwise.
            residuals: one per skip connection and one for the middle block, added where ControlNet adds them.
            adapters: what T2I-Adapters add inside the encoder, (batch, channels, ...) each; none without adapters.
            ip_embeds: image prompts, (rows, images * tokens, channels) for each IP-Adapter.
            ip_scale: how strongly each acts, (rows, cross-attentions).
            inpaint: for UNets of inpainting one (batch, 1 + channels, height/8, width/8), the mask and the latents of
                the masked picture, which they see beside the latents; none otherwise.
            guidance: (batch, rows); the guided output is this matrix times the model's output.
            conditional: (batch, rows); picks the conditional output.
            guidance_rescale: (batch,); how far the guided output gets the conditional one's standard deviation, 0 to 1
                (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16).
            history: (batch, slots, channels, height/8, width/8); what the sampler keeps from step to step.
            noise: as latents; standard normal, or zero.
            update: (batch, 1 + slots, columns); next latents and history from latents, history, output, noise, clipped.
            clip: (batch, 3); clipped = clamp(c[0] * latents + c[1] * output, -c[2], c[2]).
            mask: (batch, 1, height/8, width/8); 1 where the picture is drawn, 0 where it is known.
            known: (batch, 2, channels, height/8, width/8); the known picture's latents, and noise.
            blend: (batch, 2); how much of each the known latents after this step are.
            timestep_cond: (rows, channels), the guidance scale's embedding, for a consistency model that is told it.
        """
        sample = torch.cat([latents * _per_picture(input_scale), *inpaint], dim=1).index_select(0, rows)
        if ip_embeds:
            added = {**added, "image_embeds": (ip_embeds, ip_scale)}  # the way to ImagePromptAttention
        output = self.unet(
            sample,
            timestep.index_select(0, rows),
            prompt_embeds,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added or None,
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
            down_intrablock_additional_residuals=[features.index_select(0, rows) for features in adapters] or None,
            return_dict=False,
        )[0].flatten(1)
        guided = guidance @ output
        spread = _spread(conditional @ output) / _spread(guided).clamp(min=SMALLEST_SPREAD)
        guided = (guided * (1 + guidance_rescale[:, None] * (spread - 1))).view_as(latents)
        predicted = _per_picture(clip[:, 0]) * latents + _per_picture(clip[:, 1]) * guided
        limit = _per_picture(clip[:, 2])
        clipped = torch.minimum(torch.maximum(predicted, -limit), limit)
        seen = torch.cat([latents[:, None], history, guided[:, None], noise[:, None], clipped[:, None]], dim=1)
        following = (update @ seen.flatten(2)).unflatten(2, latents.shape[1:])
        kept = (blend[:, None] @ known.flatten(2)).view_as(latents)
        return mask * following[:, 0] + (1 - mask) * kept, following[:, 1:]


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
        regions: list[Tensor],
        residuals: list[Tensor],
        class_labels: Tensor | None = None,
    ) -> list[Tensor]:
        """Residuals so far plus this ControlNet's, each times its row's and layer's scale and its picture's region.

        Args:
            latents, rows, timestep, input_scale, prompt_embeds, added: as in UNetStep.
            hint: (batch, 3, height, width), in [0, 1].
            conditioning_scale: (rows, layers).
            regions: where it acts, (batch, 1, ...) for each size that residuals have, largest first.
            residuals: the sum so far, as many as layers.
            class_labels: (rows, ...), for a model that has a class embedding.
        """
        sample = (latents * _per_picture(input_scale)).index_select(0, rows)
        down, middle = self.controlnet(
            sample,
            timestep.index_select(0, rows),
            prompt_embeds,
            controlnet_cond=hint.index_select(0, rows),
            class_labels=class_labels,
            added_cond_kwargs=added or None,
            return_dict=False,
        )
        expanded = [region.index_select(0, rows) for region in regions]
        levels = [scale for _, scale in residual_shapes(self.controlnet)]
        sizes = sorted(set(levels))
        return [
            before + own * (conditioning_scale[:, layer, None, None, None] * expanded[sizes.index(level)])
            for layer, (before, own, level) in enumerate(zip(residuals, [*down, middle], levels, strict=True))
        ]


class AdapterProgram(nn.Module):
    """A T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): its features depend on the control picture alone."""

    def __init__(self, adapter: T2IAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, hint: Tensor) -> list[Tensor]:
        """Features of each level of the UNet's encoder, from a hint (batch, channels, height, width) in [0, 1]."""
        return list(self.adapter(hint))


class TextEncoderProgram(nn.Module):
    """A CLIP text encoder (Radford et al. 2021): token ids to prompt embeddings, and the pooled output for SDXL.

    Args:
        text_encoder: transformers' model.
        penultimate: SDXL's rule: embeddings are what the last layer reads, without the final layer norm.
        pooled: whether the pooled output is asked for.
    """

    def __init__(self, text_encoder: nn.Module, *, penultimate: bool, pooled: bool) -> None:
        super().__init__()
        self.text_encoder, self.penultimate, self.pooled = text_encoder, penultimate, pooled
        self.vocab_size = text_encoder.config.vocab_size

    def forward(self, input_ids: Tensor, clip_skip: Tensor, extra_embeddings: Tensor) -> tuple[Tensor, ...]:
        """Embeddings (batch, tokens, channels), and with ``pooled`` (batch, channels).

        Args:
            input_ids: (batch, tokens), int64; those from ``vocab_size`` on are rows of ``extra_embeddings``.
            clip_skip: (1,), int64; how many of the last layers are left out. The pooled output is of all of them.
            extra_embeddings: (extra, channels), what textual inversions learned (Gal et al. 2022, arXiv 2208.01618).
        """
        learned = input_ids >= self.vocab_size
        rows = (input_ids - self.vocab_size).clamp(min=0)

        def insert(_: nn.Module, __: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            return torch.where(learned[..., None], extra_embeddings[rows], embedded)

        handle = self.text_encoder.get_input_embeddings().register_forward_hook(insert)
        try:
            known = input_ids.masked_fill(
                learned, 0
            )  # no start or end token, so the pooled output is found all the same
            outputs = self.text_encoder(known, output_hidden_states=True, return_dict=True)
        finally:
            handle.remove()
        states = outputs.hidden_states[: -1 if self.penultimate else None]
        embeds = torch.stack(states).index_select(0, len(states) - 1 - clip_skip)[0]
        if not self.penultimate:
            embeds = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(embeds)
        return (embeds, outputs.text_embeds) if self.pooled else (embeds,)


class VaeDecoderProgram(nn.Module):
    """Latents to pictures in [0, 1], channels last.

    Args:
        vae: diffusers' model.
        clamp: leave nothing outside of that; tiles are blended before.
    """

    def __init__(self, vae: AutoencoderKL, *, clamp: bool = True) -> None:
        super().__init__()
        self.vae, self.clamp = vae, clamp
        self.shift = vae.config.shift_factor or 0.0

    def forward(self, latents: Tensor) -> Tensor:
        """(batch, channels, height/8, width/8) to (batch, height, width, 3)."""
        picture = self.vae.decode(latents / self.vae.config.scaling_factor + self.shift, return_dict=False)[0] / 2 + 0.5
        return (picture.clamp(0, 1) if self.clamp else picture).permute(0, 2, 3, 1)


class VaeEncoderProgram(nn.Module):
    """Pictures to the mean and standard deviation of their scaled latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.shift = vae.config.shift_factor or 0.0

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, height, width, 3) in [0, 1] to two of (batch, channels, height/8, width/8)."""
        # with channels last in memory PyTorch's group norm sums less exactly than the graph, which is compared with it
        first = picture.permute(0, 3, 1, 2).contiguous()
        posterior = self.vae.encode(first * 2 - 1, return_dict=False)[0]
        scale = self.vae.config.scaling_factor
        return (posterior.mean - self.shift) * scale, posterior.std * scale


def _per_picture(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _spread(rows: Tensor) -> Tensor:
    """Standard deviation of each row: (rows, 1)."""
    return (rows - rows.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()


def residual_shapes(unet: UNet2DConditionModel | ControlNetModel) -> list[tuple[int, int]]:
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
