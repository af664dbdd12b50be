"""A diffusers pipeline's weights in the layout that Stable Diffusion was first published in.

Written from that layout's own description of its blocks (a list of input blocks, a middle block, a list of output
blocks), independently of the names that ``controlrt.export`` uses; diffusers' conversion reads what comes out.
"""

from __future__ import annotations

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
RESBLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def renamed(tensors: Tensors, prefix: str, target: str, inner: dict[str, str] | None = None) -> Tensors:
    """Tensors below ``prefix``, moved to ``target``, with the first match of ``inner`` in the rest renamed."""
    moved = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            rest = name.removeprefix(f"{prefix}.")
            for old, new in (inner or {}).items():
                if rest.startswith(f"{old}."):
                    rest = new + rest.removeprefix(old)
                    break
            moved[f"{target}.{rest}"] = value
    return moved


def encoder_blocks(tensors: Tensors, blocks: int, layers: int) -> Tensors:
    """The input blocks and the middle block, of a UNet or a ControlNet."""
    found = renamed(tensors, "conv_in", "input_blocks.0.0")
    found |= renamed(tensors, "time_embedding.linear_1", "time_embed.0")
    found |= renamed(tensors, "time_embedding.linear_2", "time_embed.2")
    found |= renamed(tensors, "time_embedding.cond_proj", "time_embedding.cond_proj")  # it has no such layer
    found |= renamed(tensors, "add_embedding", "label_emb.0", {"linear_1": "0", "linear_2": "2"})
    index = 1
    for block in range(blocks):
        for layer in range(layers):
            found |= renamed(tensors, f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{index}.0", RESBLOCK)
            found |= renamed(tensors, f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{index}.1")
            index += 1
        found |= renamed(tensors, f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{index}.0.op")
        index += 1
    found |= renamed(tensors, "mid_block.resnets.0", "middle_block.0", RESBLOCK)
    found |= renamed(tensors, "mid_block.attentions.0", "middle_block.1")
    return found | renamed(tensors, "mid_block.resnets.1", "middle_block.2", RESBLOCK)


def unet_tensors(unet: Any) -> Tensors:
    tensors, layers = unet.state_dict(), unet.config.layers_per_block
    blocks = len(unet.config.block_out_channels)
    found = encoder_blocks(tensors, blocks, layers)
    index = 0
    for block in range(blocks):
        for layer in range(layers + 1):
            found |= renamed(tensors, f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{index}.0", RESBLOCK)
            attention = renamed(tensors, f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{index}.1")
            found |= attention
            if layer == layers:
                place = f"output_blocks.{index}.{2 if attention else 1}.conv"
                found |= renamed(tensors, f"up_blocks.{block}.upsamplers.0.conv", place)
            index += 1
    return found | renamed(tensors, "conv_norm_out", "out.0") | renamed(tensors, "conv_out", "out.2")


def controlnet_tensors(controlnet: Any) -> Tensors:
    tensors, layers = controlnet.state_dict(), controlnet.config.layers_per_block
    found = encoder_blocks(tensors, len(controlnet.config.block_out_channels), layers)
    found |= renamed(tensors, "controlnet_mid_block", "middle_block_out.0")
    for index in range(len(controlnet.controlnet_down_blocks)):
        found |= renamed(tensors, f"controlnet_down_blocks.{index}", f"zero_convs.{index}.0")
    hint = "controlnet_cond_embedding"
    found |= renamed(tensors, f"{hint}.conv_in", "input_hint_block.0")
    for index in range(len(controlnet.controlnet_cond_embedding.blocks)):
        found |= renamed(tensors, f"{hint}.blocks.{index}", f"input_hint_block.{2 * index + 2}")
    return found | renamed(tensors, f"{hint}.conv_out", "input_hint_block.14")


def vae_tensors(vae: Any) -> Tensors:
    tensors = vae.state_dict()
    levels, layers = len(vae.config.block_out_channels), vae.config.layers_per_block
    found = renamed(tensors, "quant_conv", "quant_conv") | renamed(tensors, "post_quant_conv", "post_quant_conv")
    shortcut = {"conv_shortcut": "nin_shortcut"}
    for side, blocks, many in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        for part, target in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            found |= renamed(tensors, f"{side}.{part}", f"{side}.{target}")
        for index in range(2):
            found |= renamed(tensors, f"{side}.mid_block.resnets.{index}", f"{side}.mid.block_{index + 1}", shortcut)
        attention = renamed(tensors, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", ATTENTION)
        for name, value in attention.items():  # linear layers here, convolutions of size 1 there
            found[name] = value[..., None, None] if value.dim() == 2 else value
        for level in range(levels):
            theirs = level if side == "encoder" else levels - 1 - level
            for layer in range(many):
                place = f"{side}.{blocks}.{theirs}.block.{layer}"
                found |= renamed(tensors, f"{side}.{blocks}_blocks.{level}.resnets.{layer}", place, shortcut)
            place = f"{side}.{blocks}.{theirs}.{blocks}sample.conv"
            found |= renamed(tensors, f"{side}.{blocks}_blocks.{level}.{blocks}samplers.0.conv", place)
    return found


def clip_tensors(model: Any) -> Tensors:
    """transformers' own names, below text_model."""
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in model.state_dict().items()}


def open_clip_tensors(model: Any, *, spare_layer: bool) -> Tensors:
    """OpenCLIP's names; queries, keys and values are one matrix. ``spare_layer``: one more, which 2.x leaves off."""
    tensors = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    found = {
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "logit_scale": torch.tensor(4.6),
    }
    found |= renamed(tensors, "final_layer_norm", "ln_final")
    width = model.config.hidden_size
    projection = tensors.get("text_projection.weight")
    found["text_projection"] = torch.eye(width) if projection is None else projection.T
    layers = model.config.num_hidden_layers
    for layer in range(layers + spare_layer):
        old, new = f"encoder.layers.{min(layer, layers - 1)}", f"transformer.resblocks.{layer}"
        found |= renamed(tensors, f"{old}.layer_norm1", f"{new}.ln_1")
        found |= renamed(tensors, f"{old}.layer_norm2", f"{new}.ln_2")
        found |= renamed(tensors, f"{old}.mlp", f"{new}.mlp", {"fc1": "c_fc", "fc2": "c_proj"})
        found |= renamed(tensors, f"{old}.self_attn.out_proj", f"{new}.attn.out_proj")
        for kind in ("weight", "bias"):
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(
                [tensors[f"{old}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
            )
    return found


def checkpoint_tensors(pipeline: Any, family: str) -> Tensors:
    """The whole pipeline as the single file of its kind."""
    parts = {"model.diffusion_model.": unet_tensors(pipeline.unet), "first_stage_model.": vae_tensors(pipeline.vae)}
    if family in ("sd15", "consistency"):
        parts["cond_stage_model.transformer."] = clip_tensors(pipeline.text_encoder)
    elif family == "sd21":
        parts["cond_stage_model.model."] = open_clip_tensors(pipeline.text_encoder, spare_layer=True)
    else:
        parts["conditioner.embedders.0.transformer."] = clip_tensors(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_tensors(pipeline.text_encoder_2, spare_layer=False)
    found = {
        prefix + name: value.clone().contiguous()
        for prefix, tensors in parts.items()
        for name, value in tensors.items()
    }
    return found | {"alphas_cumprod": torch.linspace(1, 0, 1000), "model_ema.decay": torch.tensor(0.9)}
