"""ControlNets: diffusers folders, and single files in the original layout or in diffusers'."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlrt.export.checkpoint.architectures import empty_model
from controlrt.export.checkpoint.quiet_loading import loading, loading_options, prepared, refuse_incomplete
from controlrt.export.checkpoint.single_file import fill
from controlrt.export.checkpoint.tensor_file import TensorFile, read_tensor_file
from controlrt.runtime.errors import SourceError

CLASSES = ("ControlNetModel", "ControlNetUnionModel")
SUPPORTED = f"supported: {' and '.join(CLASSES)}"
FULL = f"take the full ControlNet; {SUPPORTED}"
REFUSALS = (  # what else controls a UNet, by a pattern of its tensors' names
    (r"^lora_controlnet$", f"a Control-LoRA, a difference to the UNet's own encoder; {FULL}"),
    (r"^difference$", f"a difference file, to be added to another checkpoint first; {FULL}"),
    (r"^(adapter\.)?body\.\d", "a T2I-Adapter; give it with --adapter"),
    (r"(base_to_ctrl|ctrl_to_base|control_to_base|zero_convs_out|scale_list)", f"a ControlNet-XS; {SUPPORTED}"),
    (r"^(lora_unet_|lora_te|unet\.)", "a LoRA; merge it with --lora"),
    (r"^model\.diffusion_model\.", "a whole checkpoint; give it with --model"),
)
ORIGINAL = "control_model."
UNION = "task_embedding"
"""The tensor that only a ControlNet Union has: one row for each type of control picture."""
ADDED_EMBEDDING = {"0": "linear_1", "2": "linear_2"}


def load_controlnet(name: str, path: Path, unet: Any, *, values: bool = True) -> Any:
    """A resolved ControlNet for ``unet``, in float32; without ``values`` its shapes and config alone.

    Raises:
        SourceError: damaged or missing weights, another kind of control, or one for another architecture.
    """
    import diffusers

    if path.is_file():
        return _load_file(name, path, unet, values=values)
    with loading(path):
        config = json.loads((path / "config.json").read_text())
        kind = config.get("_class_name")
        if kind not in CLASSES:
            raise SourceError(f"ControlNet {name} ({path}) is a {kind}; {SUPPORTED}")
        _refuse_foreign(name, path, config, unet)
        if not values:
            return prepared(empty_model(kind, config))
        load = getattr(diffusers, kind).from_pretrained
        controlnet, info = load(path, output_loading_info=True, **loading_options(path))
        refuse_incomplete(f"ControlNet {name} ({path})", info)
        return prepared(controlnet)


def _load_file(name: str, path: Path, unet: Any, *, values: bool) -> Any:
    """The config that the file leaves unsaid is the UNet's: a ControlNet is a copy of its encoder.

    The first files in the original layout hold the whole training run: Stable Diffusion beside ``control_model.*``,
    which alone is read.
    """
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    what = f"ControlNet {name} ({path})"
    file = read_tensor_file(path)
    tensors = file.having(ORIGINAL) or file.having("controlnet.") or dict(file.tensors)
    _refuse_others(what, file, tensors)
    if not {"time_embed.0.weight", "time_embedding.linear_1.weight"} & set(tensors):
        raise SourceError(f"{what} is no ControlNet: {len(tensors)} tensors such as {next(iter(tensors))}")
    if UNION in tensors:
        return _load_union(what, path, tensors, unet, values=values)
    controlnet = empty_model("ControlNetModel", _config("ControlNetModel", path, tensors, unet))
    if not values:
        return prepared(controlnet)
    with loading(path):
        converted = convert_controlnet_checkpoint(tensors, controlnet.config)
        for theirs, ours in ADDED_EMBEDDING.items():  # of XL, which the conversion leaves out
            converted |= {
                f"add_embedding.{ours}.{kind}": tensors[f"label_emb.0.{theirs}.{kind}"]
                for kind in ("weight", "bias")
                if f"label_emb.0.{theirs}.{kind}" in tensors
            }
    fill(controlnet, converted, what, "a ControlNet of the model's architecture")
    return prepared(controlnet)


def _load_union(what: str, path: Path, tensors: Mapping[str, Any], unet: Any, *, values: bool) -> Any:
    """A ControlNet Union, whose published files have diffusers' names."""
    for name in ("transformer_layes.0.attn.in_proj_weight", "spatial_ch_projs.weight"):
        if name not in tensors:
            raise SourceError(f"{what} is a ControlNet Union without {name}; its tensors must have diffusers' names")
    layers = {name.split(".")[1] for name in tensors if name.startswith("transformer_layes.")}
    types, channels = tensors[UNION].shape
    config = {
        **_config("ControlNetUnionModel", path, tensors, unet),
        "num_control_type": types,
        "num_trans_channel": channels,
        "num_trans_layer": len(layers),
        "num_proj_channel": tensors["spatial_ch_projs.weight"].shape[0],
    }
    union = empty_model("ControlNetUnionModel", config)
    if values:
        fill(union, tensors, what, "a ControlNet Union of the model's architecture")
    return prepared(union)


def _config(kind: str, path: Path, tensors: Mapping[str, Any], unet: Any) -> dict[str, Any]:
    import diffusers

    channels = _hint_channels(tensors)
    shared = set(inspect.signature(getattr(diffusers, kind).__init__).parameters) & set(unet.config)
    return {
        **{key: unet.config[key] for key in shared},
        "in_channels": _first(tensors, "conv_in.weight", "input_blocks.0.0.weight").shape[1],
        "conditioning_channels": channels[0],
        "conditioning_embedding_out_channels": channels[1:],
        # no tensor tells; of the published ones, shuffle's alone are averaged over the picture
        "global_pool_conditions": "shuffle" in path.stem.lower(),
    }


def _hint_channels(tensors: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels of the control picture, then those of the hint encoder's levels."""
    first = _first(tensors, "controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
    # the encoder's second block of each level takes the channels further
    weights = []
    for name, value in tensors.items():
        original = re.fullmatch(r"input_hint_block\.(\d+)\.weight", name)
        ours = re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)\.weight", name)
        if ours:
            weights.append((int(ours[1]), value))
        elif original and 0 < int(original[1]) < 14:
            weights.append((int(original[1]) // 2 - 1, value))
    widened = [value.shape[0] for index, value in sorted(weights, key=lambda pair: pair[0]) if index % 2 == 1]
    return (first.shape[1], first.shape[0], *widened)


def _first(tensors: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in tensors:
            return tensors[name]
    raise SourceError(f"a ControlNet has one of {' and '.join(names)}, this one neither")


def _refuse_others(what: str, file: TensorFile, tensors: Mapping[str, Any]) -> None:
    marks = [name for name in file.tensors if "." not in name]  # of the file as a whole, such as lora_controlnet
    for pattern, is_a in REFUSALS:
        if any(re.search(pattern, name) for name in (*tensors, *marks)):
            raise SourceError(f"{what} is {is_a}")


def _refuse_foreign(name: str, path: Path, config: Mapping[str, Any], unet: Any) -> None:
    """Raises SourceError for a ControlNet whose residuals would not fit the UNet."""
    fields = ("cross_attention_dim", "in_channels", "block_out_channels", "layers_per_block", "addition_embed_type")
    for field in fields:
        # a UNet of inpainting sees more than latents, its ControlNets do not
        theirs = unet.config["out_channels" if field == "in_channels" else field]
        ours = config.get(field, theirs)
        if ours != theirs and not (isinstance(ours, (list, tuple)) and list(ours) == list(theirs)):
            raise SourceError(
                f"ControlNet {name} ({path}) was made for another model: {field} is {ours}, the UNet has {theirs}"
            )
