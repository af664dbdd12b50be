"""controlrt export: trace a checkpoint and its ControlNets to ONNX (``controlrt build`` calls this itself)."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from controlrt.export.exporter import ExportOptions, export
from controlrt.runtime.commands import INTERRUPTED, named_values
from controlrt.runtime.commands.ip_adapter_option import IP_ADAPTER_FORM, IP_ADAPTER_HELP, parse_ip_adapters
from controlrt.runtime.commands.lora_option import LORA_FORM, LORA_HELP, LoraOption
from controlrt.runtime.profile import ShapeProfile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--profile", default="512x512", help="picture sizes, such as 512x512 or 512-768x512")
    parser.add_argument("--batch", default="1", help="pictures per call, such as 1 or 1-4")
    parser.add_argument("--prompt-chunks", default="1", help="chunks of 75 tokens a prompt may have, such as 1 or 1-3")
    parser.add_argument("--vae-tile", type=int, metavar="SIDE", help="the largest picture that the VAE takes at once")
    parser.add_argument("--model", required=True, help="diffusers folder, .safetensors file or hub id")
    parser.add_argument("--controlnet", action="append", default=[], metavar="NAME=SOURCE", help="may be repeated")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=SOURCE", help="a T2I-Adapter; likewise")
    parser.add_argument("--ip-adapter", action="append", default=[], metavar=IP_ADAPTER_FORM, help=IP_ADAPTER_HELP)
    parser.add_argument("--image-encoder", metavar="SOURCE", help="of the IP-Adapters, where it is not beside them")
    parser.add_argument("--lora", action="append", default=[], metavar=LORA_FORM, help=LORA_HELP)
    parser.add_argument("--config", help="for a single file: diffusers folder or hub id of the same architecture")
    parser.add_argument(
        "--prediction-type", choices=("epsilon", "v_prediction"), help="for a single file: what its UNet predicts"
    )
    parser.add_argument("--report", type=Path, help="write where the programs are to this JSON file")


def run(arguments: argparse.Namespace) -> int:
    """Exports and prints where the programs are."""
    options = ExportOptions(
        model=arguments.model,
        controlnets=named_values(arguments.controlnet, "--controlnet", "NAME=SOURCE"),
        adapters=named_values(arguments.adapter, "--adapter", "NAME=SOURCE"),
        ip_adapters=parse_ip_adapters(arguments.ip_adapter),
        image_encoder=arguments.image_encoder,
        profile=ShapeProfile.parse(arguments.profile, arguments.batch, arguments.prompt_chunks, arguments.vae_tile),
        loras=tuple(map(LoraOption.parse, arguments.lora)),
        config=arguments.config,
        prediction_type=arguments.prediction_type,
    )
    try:
        exported = export(options, shlex.join(["controlrt", *sys.argv[1:]]))
    except KeyboardInterrupt:
        if arguments.report:  # the build that started this process speaks for both
            return INTERRUPTED
        raise
    if arguments.report:
        arguments.report.write_text(json.dumps({"path": str(exported.path), "cached": exported.cached}))
    else:
        print(f"{'already exported' if exported.cached else 'exported'}: {exported.path}")
    return 0
