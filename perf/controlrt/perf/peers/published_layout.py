"""Checkpoints in the names of tensors that they were published with, for a runtime that knows no others.

diffusers' folders name UNet and VAE as every reader of them expects; a ControlNet's names there are known to diffusers
alone, and transformers 5 leaves a prefix out of the text encoder's.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.storage import atomic_directory, lock, sha256_file

_PREFIX = "text_model."
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


class PublishedCheckpoint:
    """A checkpoint of Stable Diffusion 1.x and its ControlNet by the names that they were published with; written once.

    Args:
        model, controlnet: diffusers folders.
        cache: where it is kept.

    Raises:
        ControlRTError: a folder that is not of that kind, or lacks the files that are read.
    """

    def __init__(self, model: Path, controlnet: Path, cache: Path) -> None:
        files = _checked(model, controlnet)
        content = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(f"{content}{sha256_file(Path(__file__))}".encode()).hexdigest()
        directory = cache / "published" / key[:12]
        with lock(directory):
            if not directory.is_dir():
                with atomic_directory(directory) as partial:
                    write_model(model, partial / "model")
                    write_controlnet(controlnet, partial / "controlnet.safetensors")
        self.model = directory / "model"
        """A diffusers folder."""
        self.controlnet = directory / "controlnet.safetensors"


def _checked(model: Path, controlnet: Path) -> list[Path]:
    """The files that are read of both."""
    config = controlnet / "config.json"
    weights = [
        *(model / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
        model / "text_encoder" / "model.safetensors",
        controlnet / "diffusion_pytorch_model.safetensors",
    ]
    for file in (model / "scheduler" / "scheduler_config.json", config, *weights):
        if not file.is_file():
            raise ControlRTError(f"stable-diffusion.cpp is run from diffusers folders, and {file} is not there")
    said = json.loads(config.read_text())
    if said.get("cross_attention_dim") != 768 or len(said.get("block_out_channels", ())) != 4:
        raise ControlRTError("stable-diffusion.cpp is run with Stable Diffusion 1.x, which this ControlNet is not for")
    return weights


def write_model(source: Path, target: Path) -> None:
    """Makes ``target`` a diffusers folder with the weights of ``source``; what needs no other names is linked."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    for part in source.iterdir():
        if part.name != "text_encoder":
            (target / part.name).symlink_to(part.resolve())
    (target / "text_encoder").mkdir()
    tensors = load_file(source / "text_encoder" / "model.safetensors")
    named = {name if name.startswith(_PREFIX) else f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    save_file(named, target / "text_encoder" / "model.safetensors")


def write_controlnet(source: Path, target: Path) -> None:
    """Writes the ControlNet of Stable Diffusion 1.x in the diffusers folder ``source`` to the file ``target``.

    Raises:
        ControlRTError: a tensor that it does not have.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    save_file({published(name): tensor for name, tensor in tensors.items()}, target)


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
    raise ControlRTError(f"{name} is no tensor of a ControlNet of Stable Diffusion 1.x")


def _in_resnet(name: str) -> str:
    layer, rest = name.split(".", 1)
    return f"{_RESNET[layer]}.{rest}"
