"""What the entries of LoRA files are called, and which module of the pipeline each means.

Three layouts are about: kohya's and LyCORIS' (``lora_unet_down_blocks_0_..._to_q.lora_down.weight``, dots written as
underscores), diffusers' (``unet.down_blocks.0...to_q.lora.down.weight``, older ones with ``processor``) and PEFT's
(``unet.down_blocks.0...to_q.lora_A.weight``). SDXL's in the first layout name the UNet's modules as they were first
published (``input_blocks_4_1_...``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from controlrt.export.checkpoint.lora_change import ROLES
from controlrt.export.checkpoint.original_names import original_name

UNDERSCORED = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
DOTTED = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
    "diffusion_model.": "unet",
    "": "unet",
}
SPELLED_ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
} | {role: role for role in ROLES - {"down", "up", "mid", "up_bias", "magnitude"}}
PROCESSOR = re.compile(r"^(.*?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
UNET_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(?=\.(?:weight|bias)$|$)")


def split_name(name: str) -> tuple[str, str] | None:
    """A tensor's name as its entry and its role there; None for what is no part of a LoRA."""
    name = ADAPTER_NAME.sub(r".\1", name)
    processor = PROCESSOR.match(name)
    if processor:
        owner, which, role = processor.groups()
        projections = TEXT_PROJECTIONS if owner.endswith("self_attn") else UNET_PROJECTIONS
        return f"{owner}.{projections[which]}", role
    parts = name.split(".")
    for count in (3, 2, 1):
        role = SPELLED_ROLES.get(".".join(parts[-count:]))
        if role is not None and len(parts) > count:
            return ".".join(parts[:-count]), role
    return None


class ModuleNames:
    """Finds the modules that entries mean, among those of a pipeline's models."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        """``models``: unet, text_encoder, and text_encoder_2 for SDXL."""
        self._dotted: dict[str, dict[str, Any]] = {}
        self._underscored: dict[str, dict[str, Any]] = {}
        for part, model in models.items():
            modules = {
                _without_wrapper(name): module
                for name, module in model.named_modules()
                if getattr(module, "weight", None) is not None
            }
            if part == "unet":
                modules |= {original_name(name, model.config): module for name, module in modules.items()}
            self._dotted[part] = modules
            self._underscored[part] = {name.replace(".", "_"): module for name, module in modules.items()}

    def find(self, entry: str) -> Any | None:
        """The module that an entry means; None where there is none."""
        for prefix, part in UNDERSCORED.items():
            if entry.startswith(prefix) and "." not in entry:
                name = entry.removeprefix(prefix).removeprefix("text_model_")
                return self._underscored.get(part, {}).get(name)
        for prefix, part in DOTTED.items():
            if entry.startswith(prefix):
                found = self._dotted.get(part, {}).get(_without_wrapper(entry.removeprefix(prefix)))
                if found is not None:
                    return found
        return None


def part_of(entry: str) -> str:
    """Which model an entry is of, by its prefix."""
    for prefix, part in (UNDERSCORED if "." not in entry else DOTTED).items():
        if entry.startswith(prefix):
            return part
    return "unet"


def _without_wrapper(name: str) -> str:
    """CLIPTextModel wraps its modules in ``text_model`` in some versions of transformers, and files follow either."""
    return name.removeprefix("text_model.")
