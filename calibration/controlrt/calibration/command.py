"""See what the layers of a checkpoint read, for a bundle in int8 or fp8; or show what was seen.

``controlrt calibrate --model ...`` is short for ``controlrt calibrate collect --model ...``.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from controlrt.calibration import report
from controlrt.calibration.cases import GUIDANCE_SCALES, SAMPLERS, CollectOptions
from controlrt.calibration.collect import check_output, collect, partial_file
from controlrt.calibration.data import DEMO, check_set
from controlrt.compiler.quantization.statistics import Statistics
from controlrt.engines.build import BuildOptions, build
from controlrt.engines.source_options import Sources, add_source_arguments, parse_sources
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.commands.generate import parse_size
from controlrt.runtime.errors import ParameterError, UserError
from controlrt.runtime.storage import cache_root, check_writable

DEFAULT = "collect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommands."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add, _) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        # given before or after the name; not given there, it must not undo what was given before
        command.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        add(command)


def expand(argv: Sequence[str]) -> list[str]:
    """Puts in the subcommand that is meant where none is named."""
    flags = ("-v", "--verbose")
    first = next((number for number, word in enumerate(argv) if word not in flags), len(argv))
    if first < len(argv) and argv[first] in (*COMMANDS, "-h", "--help"):
        return list(argv)
    return [*argv[:first], DEFAULT, *argv[first:]]


def run(arguments: argparse.Namespace) -> int:
    """Runs the subcommand that was named."""
    return COMMANDS[arguments.command][2](arguments)


def _add_collect_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="SET",
        help="a folder of pictures with captions, a .jsonl file, or demo (the default for the demo model)",
    )
    parser.add_argument("--cases", type=int, default=CollectOptions.cases, help="calls to look into")
    parser.add_argument("--steps", type=int, default=CollectOptions.steps, help="of each call")
    parser.add_argument(
        "--samplers", default=",".join(SAMPLERS), metavar="NAME[,NAME]", help="taken in turn (controlrt samplers)"
    )
    parser.add_argument(
        "--guidance",
        default=",".join(f"{scale:g}" for scale in GUIDANCE_SCALES),
        metavar="SCALE[,SCALE]",
        help="guidance scales, taken in turn; 1 is without",
    )
    parser.add_argument("--size", metavar="WxH", help="picture size; the profile's default where not given")
    parser.add_argument("--seed", type=int, default=CollectOptions.seed, help="of noise, order and samples")
    parser.add_argument(
        "--unseen",
        type=int,
        default=CollectOptions.unseen,
        metavar="N",
        help="further calls, of other examples, to compare int8 or fp8 with float32 by",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("statistics.safetensors"), help="the file to write; statistics.safetensors"
    )


def _collect(arguments: argparse.Namespace) -> int:
    sources = parse_sources(arguments)
    if arguments.data is None and arguments.model is not None:
        raise UserError("say what to calibrate on: --data FOLDER of pictures with captions, or --data FILE.jsonl")
    profile = sources["profile"]
    options = CollectOptions(
        cases=arguments.cases,
        steps=arguments.steps,
        samplers=tuple(name.strip() for name in arguments.samplers.split(",") if name.strip()),
        guidance_scales=_numbers(arguments.guidance, "--guidance"),
        size=parse_size(arguments.size, "--size") if arguments.size else profile.default_size,
        seed=arguments.seed,
        unseen=arguments.unseen,
    )
    profile.check(*options.size, profile.batch.low)
    check_output(arguments.output)
    check_set(arguments.data or DEMO)
    started = time.monotonic()
    bundle = calibration_bundle(sources, shlex.join(["controlrt", *sys.argv[1:]]))
    try:
        statistics = collect(bundle, arguments.data or DEMO, options, arguments.output)
    except KeyboardInterrupt:
        print(f"what was seen is in {partial_file(arguments.output)}; the same call goes on from it", file=sys.stderr)
        raise
    layers = sum(map(len, statistics.layers.values()))
    print(
        f"{arguments.output}: {layers} layers of {', '.join(sorted(statistics.layers))} in {options.cases} cases of "
        f"{options.steps} steps, {len(statistics.unseen)} kept for comparison, in {time.monotonic() - started:.0f} s"
    )
    return 0


def calibration_bundle(sources: Sources, command: str) -> Bundle:
    """The bundle that is looked into: in float32, for ONNX Runtime. The cache keeps it.

    Args:
        sources: what it is made of.
        command: for its manifest.
    """
    digest = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()
    output = cache_root() / "calibration" / digest[:32]
    options = BuildOptions(**sources, output=output, backend="onnxruntime", precision="fp32", for_calibration=True)
    return build(options, command).bundle


def _add_show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("statistics", type=Path, help="a file that calibrate wrote")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="the page to write; beside the statistics where not given"
    )


def _show(arguments: argparse.Namespace) -> int:
    output = arguments.output or arguments.statistics.with_suffix(".html")
    statistics = Statistics.load(arguments.statistics)
    check_writable(output)
    report.write(statistics, output)
    print(f"{output}: {sum(map(len, statistics.layers.values()))} layers of {', '.join(statistics.layers)}")
    return 0


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ParameterError(option, text, "a number, or several with commas between them") from None


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    DEFAULT: ("run a checkpoint in float32 and write down what its layers read", _add_collect_arguments, _collect),
    "show": ("draw what was written down as one page of HTML", _add_show_arguments, _show),
}
"""What each does, declares and runs."""
