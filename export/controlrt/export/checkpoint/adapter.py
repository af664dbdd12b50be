"""T2I-Adapters: diffusers folders, and single files in the original layout or in diffusers'."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlrt.export.checkpoint.architectures import empty_model
from controlrt.export.checkpoint.quiet_loading import loading, loading_options, prepared, refuse_incomplete
from controlrt.export.checkpoint.single_file import fill
from controlrt.export.checkpoint.tensor_file import read_tensor_file
from controlrt.runtime.errors import SourceError
from controlrt.runtime.profile import SIDE_STEP

SUPPORTED = "supported: T2IAdapter"
PREFIXES = ("adapter.", "module.", "")
"""What training scripts put before the names of tensors."""
LEVELS = 4
FACTOR, FACTOR_XL = 8, 16
"""How many pixels along a side the adapter's first layer takes for one."""

Places = list[tuple[int, int]]
"""(channels, how many times smaller than the latents), level by level."""


def load_adapter(name: str, path: Path, unet: Any, vae_scale_factor: int) -> Any:
    """A resolved T2I-Adapter for ``unet``, in float32.

    Raises:
        SourceError: damaged or missing weights, another kind of model, or one for another architecture.
    """
    from diffusers import T2IAdapter

    what = f"adapter {name} ({path})"
    if path.is_file():
        adapter = _load_file(what, path)
    else:
        with loading(path):
            config = json.loads((path / "config.json").read_text())
            if config.get("_class_name") != "T2IAdapter":
                raise SourceError(f"{what} is a {config.get('_class_name')}; {SUPPORTED}")
            adapter, info = T2IAdapter.from_pretrained(path, output_loading_info=True, **loading_options(path))
            refuse_incomplete(what, info)
    adapter = prepared(adapter)
    _refuse_foreign(what, adapter, unet, vae_scale_factor)
    return adapter


def feature_places(adapter: Any, vae_scale_factor: int) -> Places:
    """What an adapter gives, level by level; the sizes of its features are nowhere in its config."""
    import torch

    side = SIDE_STEP * 2
    with torch.no_grad():
        features = adapter(torch.zeros(1, adapter.config.in_channels, side, side))
    return [(feature.shape[1], side // feature.shape[2] // vae_scale_factor) for feature in features]


def unet_places(unet: Any) -> Places:
    """Where diffusers adds features: in a block with attention before its downsampling, after it in one without.

    One more, of the middle block's size, goes there.
    """
    places, scale = [], 1
    kinds, channels = unet.config.down_block_types, unet.config.block_out_channels
    for block, (kind, width) in enumerate(zip(kinds, channels, strict=True)):
        halved = 2 if block < len(channels) - 1 else 1
        places.append((width, scale if "CrossAttn" in kind else scale * halved))
        scale *= halved
    return [*places, (channels[-1], scale)]


def _load_file(what: str, path: Path) -> Any:
    """An adapter of one file, named as TencentARC does (diffusers' convert_original_t2i_adapter.py) or as diffusers."""
    tensors: Mapping[str, Any] = read_tensor_file(path).tensors
    prefix = next(prefix for prefix in PREFIXES if not prefix or all(name.startswith(prefix) for name in tensors))
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if not any(name.startswith("body.0.") for name in tensors):
        raise SourceError(
            f"{what} is no T2I-Adapter: {len(tensors)} tensors such as {next(iter(tensors))}; {SUPPORTED}"
        )
    if not any(".resnets." in name for name in tensors):
        tensors = _from_original(tensors)
    adapter = empty_model("T2IAdapter", _config(what, tensors))
    fill(adapter, {f"adapter.{name}": value for name, value in tensors.items()}, what, "a T2I-Adapter")
    return adapter


def _from_original(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' names. The full adapter's blocks are one list over all levels, the light one's a list for each."""
    light = any(name.startswith("body.0.body.") for name in tensors)
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("body."))
    each = max(1, blocks // LEVELS)
    found = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"body\.(\d+)\.(.+)", name)
        if match and light:
            name = f"body.{match[1]}.{re.sub(r'^body', 'resnets', match[2])}"
        elif match:
            level, block = divmod(int(match[1]), each)
            within = match[2] if match[2].startswith("in_conv.") else f"resnets.{block}.{match[2]}"
            name = f"body.{level}.{within}"
        found[name] = value
    return found


def _config(what: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes say: the first layer sees 8x8 pixels of each channel as one, XL's 16x16."""
    light = "conv_in.weight" not in tensors
    first = tensors.get("body.0.in_conv.weight" if light else "conv_in.weight")
    last_convolution = "out_conv" if light else "resnets.0.block2"
    widths = [tensors.get(f"body.{level}.{last_convolution}.weight") for level in range(LEVELS)]
    if first is None or any(width is None for width in widths):
        raise SourceError(f"{what} is damaged, or a T2I-Adapter of another kind than four levels; {SUPPORTED}")
    seen, xl = first.shape[1], first.shape[1] in (FACTOR_XL**2, 3 * FACTOR_XL**2)
    factor = FACTOR_XL if xl else FACTOR
    channels = [width.shape[0] for width in widths if width is not None]
    return {
        "in_channels": seen // factor**2,
        "channels": channels[:-1] if light else channels,  # the light one's last level is as wide as the one before
        "num_res_blocks": len({name.split(".")[3] for name in tensors if name.startswith("body.0.resnets.")}),
        "downscale_factor": factor,
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if xl else "full_adapter",
    }


def _refuse_foreign(what: str, adapter: Any, unet: Any, vae_scale_factor: int) -> None:
    """Raises SourceError for an adapter whose features would not fit the UNet."""
    xl = unet.config.addition_embed_type == "text_time"
    made_for_xl = str(adapter.config.adapter_type).endswith("_xl")
    if made_for_xl != xl:
        made, model = ("SDXL", "is not SDXL") if made_for_xl else ("Stable Diffusion 1.x", "is SDXL")
        raise SourceError(f"{what} was made for {made}, but the model {model}")
    features, wanted = feature_places(adapter, vae_scale_factor), unet_places(unet)
    if features != wanted[: len(features)]:
        raise SourceError(
            f"{what} was made for another model: its features are {_listed(features)}, the UNet takes "
            f"{_listed(wanted[: len(unet.config.block_out_channels)])}"
        )


def _listed(places: Places) -> str:
    return ", ".join(f"{channels} channels at 1/{scale}" for channels, scale in places)
