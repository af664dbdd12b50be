"""Compile a checkpoint and its ControlNets into a bundle that runs without PyTorch.

``build-engines`` and ``controlrt build`` are this program.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import get_args

from controlrt.compiler.quantization.thresholds import METHODS
from controlrt.engines.backends import BACKENDS, choose_backend
from controlrt.engines.build import BuildOptions, build
from controlrt.engines.quantization.options import MIN_PSNR_DB, SMOOTHING, QuantizationOptions
from controlrt.engines.source_options import add_source_arguments, parse_sources, source_name
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.runtime.errors import ParameterError
from controlrt.runtime.manifest import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_source_arguments(parser)
    parser.add_argument(
        "--backend", choices=sorted(BACKENDS), help="what runs the programs; the fastest one installed where not given"
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="what programs compute in; what is given up is measured and recorded (bf16: openvino only; int8 and "
        "fp8: with --calibration); where not given fp16 on a GPU and fp32 on a CPU",
    )
    parser.add_argument(
        "--fuse", default="", metavar="NAME[,NAME]", help="controls to put into one program with the UNet"
    )
    parser.add_argument(
        "--verify", action="store_true", help="check every compiler pass on seeded inputs and record the difference"
    )
    _add_quantization_arguments(parser.add_argument_group("int8 and fp8"))
    _add_engine_arguments(parser.add_argument_group("TensorRT engines"))
    parser.add_argument("--output", type=Path, help="bundle directory; bundles/MODEL-PROFILE where not given")


def _add_quantization_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration", type=Path, metavar="FILE", help="what layers read, as controlrt calibrate wrote it down"
    )
    group.add_argument(
        "--amax",
        choices=METHODS,
        help="how the largest magnitude that an input keeps is found; mse for int8 and minmax for fp8 where not given",
    )
    group.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", help="layers that stay as they are; may be repeated"
    )
    group.add_argument(
        "--smooth",
        type=_smoothing,
        default=SMOOTHING,
        metavar="ALPHA",
        help=f"how much of outliers of channels goes into weights, from 0 to 1, or none (SmoothQuant; {SMOOTHING:g})",
    )
    group.add_argument(
        "--reduce-range",
        action=argparse.BooleanOptionalAction,
        help="int8 weights of 7 bits, for CPUs without VNNI, whose sums overflow otherwise; as this machine needs it "
        "where not given",
    )
    group.add_argument(
        "--unquantized",
        choices=("bf16", "fp32"),
        help="what all else computes in (openvino); bf16 where this machine's CPU has it and nothing is given",
    )
    group.add_argument(
        "--quality-budget",
        type=float,
        metavar="ERROR",
        help="measure every block, and take those that save the most time within this relative error of the final "
        "latents, such as 0.05",
    )
    group.add_argument(
        "--min-psnr",
        type=float,
        default=MIN_PSNR_DB,
        metavar="DB",
        help=f"fail below this likeness to float32's pictures ({MIN_PSNR_DB:g})",
    )


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compute-capability",
        default="",
        metavar="X.Y[,X.Y]",
        help="GPUs to build for: 8.9, or 8.6,8.9,12.0 (tensorrt-rtx; 8.0 and later where not given)",
    )
    group.add_argument("--optimization-level", type=int, metavar="0-5", help="how long the builder searches")
    group.add_argument("--workspace", type=int, metavar="MIB", help="scratch memory that a kernel may ask for")
    group.add_argument("--aux-streams", type=int, metavar="N", help="streams that one engine may use beside its own")
    group.add_argument("--refittable", action="store_true", help="let weights be replaced in the finished engine")
    group.add_argument("--strip-weights", action="store_true", help="ship engines without weights, to be refitted")
    group.add_argument(
        "--version-compatible", action="store_true", help="let later versions of TensorRT run it (tensorrt)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Builds and prints where the bundle is."""
    sources, name = parse_sources(arguments), source_name(arguments)
    profile = sources["profile"]
    several = "" if str(profile.batch) == "1" else f"-batch{profile.batch}"
    longer = "" if str(profile.prompt_chunks) == "1" else f"-chunks{profile.prompt_chunks}"
    tiles = "" if profile.vae_tile is None else f"-tile{profile.vae_tile}"
    backend = choose_backend(arguments.backend)
    precision = arguments.precision or BACKENDS[backend].default_precision
    lower = "" if precision == "fp32" else f"-{precision}"
    output = arguments.output or Path("bundles") / f"{name}-{profile}{several}{longer}{tiles}{lower}".replace(",", "+")
    options = BuildOptions(
        **sources,
        output=output,
        backend=backend,
        precision=precision,
        fuse=tuple(name.strip() for name in arguments.fuse.split(",") if name.strip()),
        verify=arguments.verify,
        quantization=_quantization_options(arguments, precision),
        engine=EngineOptions(
            compute_capabilities=EngineOptions.parse_capabilities(arguments.compute_capability),
            optimization_level=arguments.optimization_level,
            workspace_mib=arguments.workspace,
            aux_streams=arguments.aux_streams,
            refittable=arguments.refittable,
            strip_weights=arguments.strip_weights,
            version_compatible=arguments.version_compatible,
        ),
    )
    started = time.monotonic()
    built = build(options, shlex.join(["build-engines", *sys.argv[1:]]))
    controls = ", ".join(control.name for control in built.bundle.manifest.controls) or "none"
    what = "up to date, nothing to do" if built.cached else f"built in {time.monotonic() - started:.0f} s"
    print(f"{built.bundle.path}: {what} (controls: {controls}; backend: {options.backend})")
    return 0


def _smoothing(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 to 1 nor none") from None


def _quantization_options(arguments: argparse.Namespace, precision: Precision) -> QuantizationOptions | None:
    if arguments.calibration is None:
        for option, given, default in (
            ("--amax", arguments.amax, None),
            ("--keep", arguments.keep, []),
            ("--smooth", arguments.smooth, SMOOTHING),
            ("--reduce-range", arguments.reduce_range, None),
            ("--unquantized", arguments.unquantized, None),
            ("--quality-budget", arguments.quality_budget, None),
            ("--min-psnr", arguments.min_psnr, MIN_PSNR_DB),
        ):
            if given != default:
                raise ParameterError(option, given, "left out without --precision int8 or fp8 and --calibration FILE")
        return None
    if precision != "int8" and precision != "fp8":
        raise ParameterError("--calibration", str(arguments.calibration), "left out without --precision int8 or fp8")
    return QuantizationOptions(
        precision=precision,
        statistics=arguments.calibration,
        method=arguments.amax,
        keep=tuple(arguments.keep),
        budget=arguments.quality_budget,
        smoothing=arguments.smooth,
        reduce_range=arguments.reduce_range,
        unquantized=arguments.unquantized,
        min_psnr_db=arguments.min_psnr,
    )
