"""The options that say what is built, and for which sizes: those of every command that begins with a checkpoint."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TypedDict

from controlrt.runtime.commands import named_values
from controlrt.runtime.commands.ip_adapter_option import IP_ADAPTER_FORM, IP_ADAPTER_HELP, parse_ip_adapters
from controlrt.runtime.commands.lora_option import LORA_FORM, LORA_HELP, LoraOption
from controlrt.runtime.errors import UserError
from controlrt.runtime.profile import ShapeProfile


class Sources(TypedDict):
    """As ``BuildOptions`` has them."""

    model: str
    controlnets: dict[str, str]
    adapters: dict[str, str]
    ip_adapters: dict[str, str]
    image_encoder: str | None
    profile: ShapeProfile
    loras: tuple[LoraOption, ...]
    config: str | None
    prediction_type: str | None


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--profile", default="512x512", help="picture sizes, WIDTHxHEIGHT: 512x512, 512-1024x512-1024, or a list"
    )
    parser.add_argument("--batch", default="1", help="pictures per call, a number or a range such as 1-4")
    parser.add_argument(
        "--prompt-chunks",
        default="1",
        help="chunks of 75 tokens that prompts may have, a number or a range such as 1-3; longer ones are cut",
    )
    parser.add_argument(
        "--vae-tile",
        type=int,
        metavar="SIDE",
        help="have the VAE take pictures up to this side, such as 512, and larger ones in tiles (generate "
        "--vae-tiling), which need less memory",
    )
    parser.add_argument(
        "--model", help="diffusers folder, .safetensors file or hub id; the bundled demo model where not given"
    )
    parser.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="a ControlNet and the name to call it by; may be repeated; the demo model brings canny and mask",
    )
    parser.add_argument("--lora", action="append", default=[], metavar=LORA_FORM, help=LORA_HELP)
    parser.add_argument("--config", help="for a single file: diffusers folder or hub id of the same architecture")
    parser.add_argument(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="for a single file: what its UNet predicts, where it is Stable Diffusion 2.x",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="a T2I-Adapter and the name to call it by; may be repeated",
    )
    parser.add_argument("--ip-adapter", action="append", default=[], metavar=IP_ADAPTER_FORM, help=IP_ADAPTER_HELP)
    parser.add_argument(
        "--image-encoder",
        metavar="SOURCE",
        help="of the IP-Adapters, a folder or OWNER/NAME/FOLDER; image_encoder beside the adapter where not given",
    )


def parse_sources(arguments: argparse.Namespace) -> Sources:
    """What the options say; the bundled demo model where they name none.

    Raises:
        UserError: an option that cannot be read, or no demo model in this installation.
    """
    model = arguments.model
    controlnets = named_values(arguments.controlnet, "--controlnet", "NAME=SOURCE")
    if model is None:
        from controlrt.demo import CONTROLNETS, MODEL_DIR

        if not (MODEL_DIR / "model_index.json").is_file():
            raise UserError("this installation has no demo model; name a checkpoint with --model")
        model = str(MODEL_DIR)
        controlnets = controlnets or {control: str(path) for control, path in CONTROLNETS.items()}
    return Sources(
        model=model,
        controlnets=controlnets,
        adapters=named_values(arguments.adapter, "--adapter", "NAME=SOURCE"),
        ip_adapters=parse_ip_adapters(arguments.ip_adapter),
        image_encoder=arguments.image_encoder,
        profile=ShapeProfile.parse(arguments.profile, arguments.batch, arguments.prompt_chunks, arguments.vae_tile),
        loras=tuple(map(LoraOption.parse, arguments.lora)),
        config=arguments.config,
        prediction_type=arguments.prediction_type,
    )


def source_name(arguments: argparse.Namespace) -> str:
    """The model's last name, without the suffix of a single file."""
    if arguments.model is None:
        return "demo"
    return re.sub(r"\.(safetensors|ckpt|pt|pth)$", "", Path(arguments.model).resolve().name)
