"""Give the TensorRT engines of a bundle other weights: of a ControlNet, of LoRAs, or their own where they have none."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from controlrt.engines.refit import refit
from controlrt.engines.refit_options import RefitOptions
from controlrt.runtime.commands import named_values
from controlrt.runtime.commands.ip_adapter_option import IP_ADAPTER_FORM, parse_ip_adapters
from controlrt.runtime.commands.lora_option import LORA_FORM, LoraOption

NO_LORA = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=Path, help="built with --refittable or --strip-weights")
    parser.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="what takes the place of one of its ControlNets; may be repeated",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar=LORA_FORM,
        help=f"a LoRA to merge into the model in place of the bundle's own; may be repeated; {NO_LORA} leaves out all",
    )
    parser.add_argument("--model", help="what takes the place of its model")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=SOURCE", help="likewise of a T2I-Adapter"
    )
    parser.add_argument(
        "--ip-adapter", action="append", default=[], metavar=IP_ADAPTER_FORM, help="likewise of an IP-Adapter"
    )
    parser.add_argument("-o", "--output", type=Path, help="bundle directory; BUNDLE-refitted where not given")


def run(arguments: argparse.Namespace) -> int:
    """Refits and prints where the bundle is."""
    bundle = arguments.bundle
    loras = tuple(LoraOption.parse(text) for text in arguments.lora if text != NO_LORA)
    options = RefitOptions(
        bundle=bundle,
        output=arguments.output or bundle.resolve().with_name(f"{bundle.resolve().name}-refitted"),
        model=arguments.model,
        controlnets=named_values(arguments.controlnet, "--controlnet", "NAME=SOURCE"),
        adapters=named_values(arguments.adapter, "--adapter", "NAME=SOURCE"),
        ip_adapters=parse_ip_adapters(arguments.ip_adapter),
        loras=loras if arguments.lora else None,
    )
    started = time.monotonic()
    refitted = refit(options, shlex.join(["controlrt", *sys.argv[1:]]))
    if refitted.programs is None:
        print(f"{refitted.bundle.path}: up to date, nothing to do")
        return 0
    engines = {program.name: program.engine for program in refitted.bundle.manifest.programs}
    seconds = sum(engine.refit_seconds or 0 for name, engine in engines.items() if name in refitted.programs and engine)
    print(
        f"{refitted.bundle.path}: made in {time.monotonic() - started:.0f} s; {len(refitted.programs)} of "
        f"{len(engines)} engines have other weights, which took {seconds:.1f} s"
    )
    return 0
