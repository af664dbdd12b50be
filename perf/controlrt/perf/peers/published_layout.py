"""Checkpoints in the names of tensors that they were published with, for a runtime that knows no others.

diffusers' folders name UNet and VAE as every reader of them expects; a ControlNet's names there are known to diffusers
alone, and transformers 5 leaves a prefix out of the text encoder's.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from controlrt.export.checkpoint import original_names
from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.storage import atomic_directory, lock, sha256_file

_PREFIX = "text_model."
_LAYERS = 2
"""ResNets of a block."""
_SHARED = ("conv_in", "time_embedding.linear_", "down_blocks.", "mid_block.")
"""How the modules begin that a ControlNet has of its UNet."""
_OWN = {
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
        code = [sha256_file(Path(file)) for file in (__file__, original_names.__file__)]
        key = hashlib.sha256(f"{content}{code}".encode()).hexdigest()
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
    blocks, layers = len(said.get("block_out_channels", ())), said.get("layers_per_block", _LAYERS)
    if said.get("cross_attention_dim") != 768 or (blocks, layers) != (4, _LAYERS):
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
    """What a ControlNet's tensor is called in Zhang et al.'s own files, ``input_blocks.1.0.in_layers.2.weight``.

    Raises:
        ControlRTError: a tensor that ControlNets of Stable Diffusion 1.x do not have.
    """
    module, _, parameter = name.rpartition(".")
    found = _published_module(module)
    if found is None:
        raise ControlRTError(f"{name} is no tensor of a ControlNet of Stable Diffusion 1.x")
    return f"{found}.{parameter}"


def _published_module(name: str) -> str | None:
    if zero := re.fullmatch(r"controlnet_down_blocks\.(\d+)", name):
        return f"zero_convs.{zero[1]}.0"
    if hint := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d)", name):
        return f"input_hint_block.{2 * int(hint[1]) + 2}"
    if name in _OWN:
        return _OWN[name]
    if not name.startswith(_SHARED):
        return None
    return original_names.original_name(name, {"layers_per_block": _LAYERS})
