"""The names that the modules of UNets and ControlNets had where Stable Diffusion and ControlNet were first published.

LoRA files for Stable Diffusion XL use them, and runtimes that read no others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def original_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of one of diffusers' UNet modules in the layout that Stable Diffusion was first published in."""
    simple = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if name in simple:
        return simple[name]
    per_block = int(config["layers_per_block"]) + 1
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        index = 1 + int(match[1]) * per_block + int(match[3])
        return f"input_blocks.{index}.{int(match[2] == 'attentions')}.{_inner(match[4])}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{(int(match[1]) + 1) * per_block}.0.op"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        index = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{index}.{_inner(match[3])}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        index = int(match[1]) * per_block + int(match[3])
        return f"output_blocks.{index}.{int(match[2] == 'attentions')}.{_inner(match[4])}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", name):
        block = int(match[1])
        attends = config["up_block_types"][block].startswith("CrossAttn")
        return f"output_blocks.{(block + 1) * per_block - 1}.{2 if attends else 1}.conv"
    return name


def _inner(name: str) -> str:
    """A module of a ResBlock; those of a transformer have the same names in both layouts."""
    return {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }.get(name, name)
