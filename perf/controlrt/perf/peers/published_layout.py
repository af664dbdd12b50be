"""Checkpoints in the names of tensors that they were published with, for a runtime that knows no others.

diffusers' folders name UNet and VAE as every reader of them expects; a ControlNet's names there are known to diffusers
alone, and transformers 5 leaves a prefix out of the text encoder's.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.numpy import load_file, save_file

PREFIX = "text_model."
_LAYERS = 2
"""ResNets of a block, before its downsampling."""
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}


def write_model(source: Path, target: Path) -> None:
    """Makes ``target`` a diffusers folder with the weights of ``source``; what needs no other names is linked."""
    target.mkdir(parents=True, exist_ok=True)
    for part in source.iterdir():
        if part.name != "text_encoder":
            (target / part.name).symlink_to(part.resolve())
    (target / "text_encoder").mkdir()
    tensors = load_file(source / "text_encoder" / "model.safetensors")
    named = {name if name.startswith(PREFIX) else f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    save_file(named, target / "text_encoder" / "model.safetensors")


def write_controlnet(source: Path, target: Path) -> None:
    """Writes the ControlNet of Stable Diffusion 1.x or 2.x in the diffusers folder ``source`` to the file ``target``.

    Raises:
        ValueError: a tensor that no published ControlNet of these has.
    """
    (file,) = source.glob("*.safetensors")
    save_file({published(name): tensor for name, tensor in load_file(file).items()}, target)


def published(name: str) -> str:
    """What a ControlNet's tensor is called in Zhang et al.'s own files, ``input_blocks.1.0.in_layers.2.weight``."""
    block = re.fullmatch(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.+)", name)
    if block is not None:
        number, kind, layer, rest = int(block[1]), block[2], int(block[3]), block[4]
        first = 1 + (_LAYERS + 1) * number
        if kind == "downsamplers":
            return f"input_blocks.{first + _LAYERS}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "attentions":
            return f"input_blocks.{first + layer}.1.{rest}"
        return f"input_blocks.{first + layer}.0.{_in_resnet(rest)}"
    if zero := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.+)", name):
        return f"zero_convs.{zero[1]}.0.{zero[2]}"
    if hint := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d)\.(.+)", name):
        return f"input_hint_block.{2 * int(hint[1]) + 2}.{hint[2]}"
    for ours, theirs in _OUTSIDE.items():
        if name.startswith(f"{ours}."):
            rest = name.removeprefix(f"{ours}.")
            return f"{theirs}.{_in_resnet(rest) if 'resnets' in ours else rest}"
    raise ValueError(f"{name} is no tensor of a ControlNet of Stable Diffusion 1.x or 2.x")


def _in_resnet(name: str) -> str:
    layer, rest = name.split(".", 1)
    return f"{_RESNET[layer]}.{rest}"
