"""What each exported program takes and gives: names, dtypes, shapes and example values, from the model configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn

from controlrt.export.checkpoint import Checkpoint, IPAdapterParts, TextEncoderParts, feature_places
from controlrt.export.image_prompts import IPAdapterProgram
from controlrt.export.modules import (
    AdapterProgram,
    ControlNetStep,
    TextEncoderProgram,
    UNetStep,
    VaeDecoderProgram,
    VaeEncoderProgram,
    residual_shapes,
)
from controlrt.export.union import ControlNetUnionStep
from controlrt.runtime.image_tokens import image_dimension
from controlrt.runtime.manifest import TensorSpec
from controlrt.runtime.samplers import COLUMNS, HISTORY

Sizes = dict[str, int]
"""Values of the named dimensions: batch, rows, tokens, extra, height, width."""

TIME_IDS = 6
FLOAT, INT = "float32", "int64"
POSITIVE = (
    *("input_scale", "hint", "hint_scale", "conditioning_scale", "guidance_rescale"),
    *("update", "clip", "mask", "blend"),
)
"""Inputs of a step whose values lie around one half."""


@dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """A module to trace. ``inputs`` nests as the module's arguments do; ``outputs`` is in order."""

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    outputs: tuple[TensorSpec, ...]
    example: Callable[[TensorSpec, tuple[int, ...], Sizes, torch.Generator], Tensor]

    @property
    def part(self) -> str:
        """The part of the checkpoint whose weights it has."""
        return "vae" if self.name.startswith("vae_") else self.name


def unet_program(checkpoint: Checkpoint) -> ProgramSpec:
    """The UNet step."""
    unet = checkpoint.unet
    latents = _latents("latents", checkpoint)
    history = TensorSpec(name="history", dtype=FLOAT, shape=("batch", HISTORY, *latents.shape[1:]))
    inputs = {
        **_step_inputs(checkpoint, unet),
        "residuals": [
            _residual(f"residual_{i}_in", *shape, checkpoint) for i, shape in enumerate(residual_shapes(unet))
        ],
        "adapters": _adapter_features(checkpoint),
        "ip_embeds": [
            TensorSpec(
                name=f"ip_embeds.{parts.name}",
                dtype=FLOAT,
                shape=("rows", image_dimension(number, parts.tokens), unet.config.cross_attention_dim),
            )
            for number, parts in enumerate(checkpoint.ip_adapters)
        ],
        "ip_scale": [
            TensorSpec(name=f"ip_scale.{parts.name}", dtype=FLOAT, shape=("rows", parts.layers))
            for parts in checkpoint.ip_adapters
        ],
        "inpaint": _inpaint_channels(checkpoint),
        "guidance": TensorSpec(name="guidance", dtype=FLOAT, shape=("batch", "rows")),
        "conditional": TensorSpec(name="conditional", dtype=FLOAT, shape=("batch", "rows")),
        "guidance_rescale": TensorSpec(name="guidance_rescale", dtype=FLOAT, shape=("batch",)),
        "history": history,
        "noise": TensorSpec(name="noise", dtype=FLOAT, shape=latents.shape),
        "update": TensorSpec(name="update", dtype=FLOAT, shape=("batch", 1 + HISTORY, COLUMNS)),
        "clip": TensorSpec(name="clip", dtype=FLOAT, shape=("batch", 3)),
        "mask": TensorSpec(name="mask", dtype=FLOAT, shape=("batch", 1, *latents.shape[2:])),
        "known": TensorSpec(name="known", dtype=FLOAT, shape=("batch", 2, *latents.shape[1:])),
        "blend": TensorSpec(name="blend", dtype=FLOAT, shape=("batch", 2)),
    }
    if (channels := unet.config.time_cond_proj_dim) is not None:
        inputs["timestep_cond"] = TensorSpec(name="timestep_cond", dtype=FLOAT, shape=("rows", channels))
    outputs = (
        TensorSpec(name="next_latents", dtype=FLOAT, shape=latents.shape),
        TensorSpec(name="next_history", dtype=FLOAT, shape=history.shape),
    )
    return ProgramSpec(name="unet", module=UNetStep(unet), inputs=inputs, outputs=outputs, example=_step_example)


def controlnet_program(
    checkpoint: Checkpoint, name: str, controlnet: ControlNetModel | ControlNetUnionModel
) -> ProgramSpec:
    """One ControlNet step."""
    shapes = residual_shapes(checkpoint.unet)
    hint_shape = ("batch", controlnet.config.conditioning_channels, "height", "width")
    inputs = {
        **_step_inputs(checkpoint, controlnet),
        "hint": TensorSpec(name="hint", dtype=FLOAT, shape=hint_shape),
        "conditioning_scale": TensorSpec(name="conditioning_scale", dtype=FLOAT, shape=("rows", len(shapes))),
        "regions": [
            TensorSpec(name=f"region_{level}", dtype=FLOAT, shape=("batch", 1, *_sides(downscale, checkpoint)))
            for level, downscale in enumerate(sorted({downscale for _, downscale in shapes}))
        ],
        "residuals": [_residual(f"residual_{i}_in", *shape, checkpoint) for i, shape in enumerate(shapes)],
    }
    outputs = tuple(_residual(f"residual_{i}", *shape, checkpoint) for i, shape in enumerate(shapes))
    module: nn.Module
    if isinstance(controlnet, ControlNetUnionModel):
        types = controlnet.config.num_control_type
        inputs["hint_type"] = TensorSpec(name="hint_type", dtype=FLOAT, shape=("batch", types))
        inputs["hint_scale"] = TensorSpec(name="hint_scale", dtype=FLOAT, shape=("batch",))
        inputs["control_types"] = TensorSpec(name="control_types", dtype=FLOAT, shape=("rows", types))
        module = ControlNetUnionStep(controlnet)
    else:
        module = ControlNetStep(controlnet)
    return ProgramSpec(
        name=f"controlnet.{name}",
        module=module,
        inputs=inputs,
        outputs=outputs,
        example=_step_example,
    )


def adapter_program(checkpoint: Checkpoint, name: str, adapter: T2IAdapter) -> ProgramSpec:
    """One T2I-Adapter."""
    hint = TensorSpec(name="hint", dtype=FLOAT, shape=("batch", adapter.config.in_channels, "height", "width"))
    outputs = tuple(
        msgspec.structs.replace(spec, name=f"feature_{level}")
        for level, spec in enumerate(_adapter_features(checkpoint))
    )
    return ProgramSpec(
        name=f"adapter.{name}",
        module=AdapterProgram(adapter),
        inputs={"hint": hint},
        outputs=outputs,
        example=_uniform_example,
    )


def ip_adapter_program(parts: IPAdapterParts) -> ProgramSpec:
    """The image encoder of one IP-Adapter, and its projection to tokens."""

    def example(spec: TensorSpec, shape: tuple[int, ...], _: Sizes, generator: torch.Generator) -> Tensor:
        if spec.name == "seen":
            return torch.arange(1, shape[0] + 1).remainder(2).float()
        return torch.randn(shape, generator=generator)

    return ProgramSpec(
        name=parts.program,
        module=IPAdapterProgram(parts.image_encoder, parts.projection, penultimate=parts.penultimate),
        inputs={
            "picture": TensorSpec(name="picture", dtype=FLOAT, shape=("batch", 3, parts.side, parts.side)),
            "seen": TensorSpec(name="seen", dtype=FLOAT, shape=("batch",)),
        },
        outputs=(TensorSpec(name="ip_embeds", dtype=FLOAT, shape=("batch", parts.tokens, parts.channels)),),
        example=example,
    )


def text_encoder_program(parts: TextEncoderParts) -> ProgramSpec:
    """One text encoder."""
    config = parts.model.config
    length, width = parts.max_length, config.hidden_size
    outputs = [TensorSpec(name="prompt_embeds", dtype=FLOAT, shape=("batch", length, width))]
    if parts.pooled:
        outputs.append(TensorSpec(name="text_embeds", dtype=FLOAT, shape=("batch", config.projection_dim)))

    def example(spec: TensorSpec, shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> Tensor:
        if spec.name == "extra_embeddings":
            return torch.randn(shape, generator=generator)
        if spec.name == "clip_skip":
            return torch.randint(0, parts.max_clip_skip + 1, shape, generator=generator)
        ids = torch.randint(0, config.vocab_size - 2, shape, generator=generator)
        ids[:, 5 : 5 + sizes["extra"]] = config.vocab_size + torch.arange(sizes["extra"])
        ids[:, 0], ids[:, -5:] = parts.bos_token_id, parts.eos_token_id
        return ids

    return ProgramSpec(
        name=parts.name,
        module=TextEncoderProgram(parts.model, penultimate=parts.penultimate, pooled=parts.pooled),
        inputs={
            "input_ids": TensorSpec(name="input_ids", dtype=INT, shape=("batch", length)),
            "clip_skip": TensorSpec(name="clip_skip", dtype=INT, shape=(1,)),
            "extra_embeddings": TensorSpec(name="extra_embeddings", dtype=FLOAT, shape=("extra", width)),
        },
        outputs=tuple(outputs),
        example=example,
    )


def vae_programs(checkpoint: Checkpoint, *, tiles: bool = False) -> tuple[ProgramSpec, ProgramSpec]:
    """The VAE's decoder and encoder; ``tiles`` are to be blended."""
    picture = TensorSpec(name="picture", dtype=FLOAT, shape=("batch", "height", "width", 3))
    decoder = ProgramSpec(
        name="vae_decoder",
        module=VaeDecoderProgram(checkpoint.vae, clamp=not tiles),
        inputs={"latents": _latents("latents", checkpoint)},
        outputs=(picture,),
        example=_normal_example,
    )
    encoder = ProgramSpec(
        name="vae_encoder",
        module=VaeEncoderProgram(checkpoint.vae),
        inputs={"picture": picture},
        outputs=(_latents("mean", checkpoint), _latents("std", checkpoint)),
        example=_uniform_example,
    )
    return decoder, encoder


def _step_inputs(checkpoint: Checkpoint, model: UNet2DConditionModel | ControlNetModel) -> dict[str, Any]:
    config = model.config
    added = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        added = {
            "text_embeds": TensorSpec(name="text_embeds", dtype=FLOAT, shape=("rows", pooled)),
            "time_ids": TensorSpec(name="time_ids", dtype=FLOAT, shape=("rows", TIME_IDS)),
        }
    return {
        "latents": _latents("latents", checkpoint),
        "rows": TensorSpec(name="rows", dtype=INT, shape=("rows",)),
        "timestep": TensorSpec(name="timestep", dtype=FLOAT, shape=("batch",)),
        "input_scale": TensorSpec(name="input_scale", dtype=FLOAT, shape=("batch",)),
        "prompt_embeds": TensorSpec(
            name="prompt_embeds", dtype=FLOAT, shape=("rows", "tokens", config.cross_attention_dim)
        ),
        "added": added,
    }


def _latents(name: str, checkpoint: Checkpoint) -> TensorSpec:
    factor = checkpoint.vae_scale_factor
    shape = ("batch", checkpoint.latent_channels, f"height/{factor}", f"width/{factor}")
    return TensorSpec(name=name, dtype=FLOAT, shape=shape)


def _adapter_features(checkpoint: Checkpoint) -> list[TensorSpec]:
    """What the UNet takes from adapters, by level; nothing where the checkpoint has none."""
    if not checkpoint.adapters:
        return []
    places = feature_places(next(iter(checkpoint.adapters.values())), checkpoint.vae_scale_factor)
    return [
        TensorSpec(name=f"adapter_{level}", dtype=FLOAT, shape=("batch", channels, *_sides(downscale, checkpoint)))
        for level, (channels, downscale) in enumerate(places)
    ]


def _inpaint_channels(checkpoint: Checkpoint) -> list[TensorSpec]:
    """The mask and the masked picture's latents, for a UNet that was made for inpainting."""
    extra = checkpoint.unet.config.in_channels - checkpoint.latent_channels
    if not extra:
        return []
    latents = _latents("inpaint", checkpoint)
    return [msgspec.structs.replace(latents, shape=("batch", extra, *latents.shape[2:]))]


def _sides(downscale: int, checkpoint: Checkpoint) -> tuple[str, str]:
    """Height and width of what is ``downscale`` times smaller than the latents."""
    factor = checkpoint.vae_scale_factor * downscale
    return f"height/{factor}", f"width/{factor}"


def _residual(name: str, channels: int, downscale: int, checkpoint: Checkpoint) -> TensorSpec:
    return TensorSpec(name=name, dtype=FLOAT, shape=("rows", channels, *_sides(downscale, checkpoint)))


def _normal_example(_: TensorSpec, shape: tuple[int, ...], __: Sizes, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _uniform_example(_: TensorSpec, shape: tuple[int, ...], __: Sizes, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _step_example(spec: TensorSpec, shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Values as a run has them: every picture's rows, timesteps over the schedule, scales around one."""
    if spec.name == "rows":
        return torch.arange(shape[0]) % sizes["batch"]
    if spec.name == "timestep":
        return (torch.rand(shape, generator=generator) * 999).round()
    if spec.name == "time_ids":
        return torch.rand(shape, generator=generator) * 1024
    if spec.name in POSITIVE or spec.name.startswith(("region_", "ip_scale.")):
        return torch.rand(shape, generator=generator)
    return torch.randn(shape, generator=generator)
