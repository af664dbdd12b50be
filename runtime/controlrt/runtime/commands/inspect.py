"""Show what a bundle holds, what it costs and the plan it runs by."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.commands.control_option import PLANNING_FORM, parse_planned_control
from controlrt.runtime.errors import UserError
from controlrt.runtime.inspection.engines import describe_engines
from controlrt.runtime.inspection.plan_drawing import draw_plan
from controlrt.runtime.inspection.program_table import program_table
from controlrt.runtime.inspection.quantization import describe_quantization, quantization_table
from controlrt.runtime.inspection.quantization_page import quantization_document
from controlrt.runtime.inspection.units import readable_bytes
from controlrt.runtime.inspection.workload import ControlWindow, plan_picture
from controlrt.runtime.manifest import TensorSpec
from controlrt.runtime.storage import atomic_file, check_writable

DEFAULT_STEPS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", action="store_true", help="print the whole manifest")
    parser.add_argument("--tensors", action="store_true", help="list every program's inputs and outputs")
    parser.add_argument(
        "--programs", action="store_true", help="a table of what each program is made of and costs a picture"
    )
    parser.add_argument(
        "--quantization",
        action="store_true",
        help="what is in int8 or fp8, what blocks cost and save, what stays as it was",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="for --quantization: write a page of HTML, layer by layer, instead"
    )
    parser.add_argument("--graph", action="store_true", help="draw the plan: what runs when, on which buffers")
    parser.add_argument(
        "--steps", type=int, help=f"for --programs and --graph: denoising steps, {DEFAULT_STEPS} where not given"
    )
    parser.add_argument(
        "--control",
        action="append",
        metavar=PLANNING_FORM,
        help="for --programs and --graph: a control that acts, and its window; may be repeated; all where not given",
    )


def run(arguments: argparse.Namespace) -> int:
    """Checks the bundle and prints what is asked of it."""
    plans = arguments.programs or arguments.graph
    if not plans and (arguments.steps is not None or arguments.control is not None):
        option = "--steps" if arguments.steps is not None else "--control"
        raise UserError(f"{option} says what to plan; add --programs or --graph")
    if sum((arguments.json, arguments.tensors, arguments.programs, arguments.graph, arguments.quantization)) > 1:
        raise UserError("give one of --json, --tensors, --programs, --graph and --quantization")
    if arguments.html is not None and not arguments.quantization:
        raise UserError("--html is for --quantization; add that, or drop it")
    windows = parse_windows(arguments.control)
    bundle = Bundle.open(arguments.bundle)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(bundle.manifest), indent=2).decode())
    elif arguments.quantization:
        _show_quantization(bundle, arguments.html)
    elif plans:
        work = plan_picture(bundle, DEFAULT_STEPS if arguments.steps is None else arguments.steps, windows)
        print("\n".join(program_table(bundle, work) if arguments.programs else draw_plan(bundle, work)))
    else:
        _summarize(bundle, arguments.tensors)
    return 0


def _show_quantization(bundle: Bundle, page: Path | None) -> None:
    manifest, found = bundle.manifest, bundle.manifest.quantization
    if found is None:
        raise UserError(f"{bundle.path} has nothing in int8 or fp8; build it with: build-engines --precision int8")
    if page is None:
        print("\n".join(quantization_table(found)))
        return
    check_writable(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(page) as partial:
        partial.write_text(quantization_document(bundle.path.resolve().name, manifest, found), encoding="utf-8")
    print(page)


def parse_windows(texts: Sequence[str] | None) -> dict[str, ControlWindow] | None:
    """The windows of ``--control`` by control name; None where the option is not given.

    Raises:
        UserError: one that cannot be read or cannot be, or a control named twice.
    """
    if texts is None:
        return None
    windows: dict[str, ControlWindow] = {}
    for name, options in map(parse_planned_control, texts):
        if name in windows:
            raise UserError(f"--control names {name!r} twice; give each its own name")
        windows[name] = ControlWindow(**options)
    return windows


def _summarize(bundle: Bundle, tensors: bool) -> None:
    manifest = bundle.manifest
    size = sum(bundle.file(name).stat().st_size for name in manifest.files)
    print(f"{bundle.path}: {len(manifest.files)} files, {readable_bytes(size)}, all as built")
    print(f"  model      {manifest.model.source}")
    if manifest.time_cond_proj_dim is not None:
        print("  guidance   told to the UNet (a consistency model): one row a picture, no negative prompt")
    for lora in manifest.model.loras:
        print(f"  lora       {lora.name} at {lora.weight:g} ({lora.source}, sha256 {lora.sha256[:12]})")
    for control in manifest.controls:
        for name in control.names:
            annotator = bundle.hint(name).annotator
            made = f"pictures by: controlrt annotate {annotator}" if annotator else "pictures of its own kind"
            print(f"  control    {name} ({control.layers} residuals; {made})")
    for adapter in manifest.ip_adapters:
        print(f"  ip-adapter {adapter.name} ({adapter.tokens} tokens a picture; {adapter.source})")
    profile = manifest.profile
    tiles = "" if profile.vae_tile is None else f", VAE in tiles of {profile.vae_tile}"
    print(f"  profile    {profile}, batch {profile.batch}, prompt chunks {profile.prompt_chunks}{tiles}")
    print(f"  backend    {manifest.backend}, {manifest.precision}")
    if engines := describe_engines(manifest.programs):
        print(f"  engines    {engines}")
    print(f"  built      {manifest.provenance.created} by: {manifest.provenance.command}")
    if manifest.checks:
        worst = max(manifest.checks, key=lambda check: check.max_relative_error)
        where = f"{worst.compiler_pass} on {worst.program}"
        print(f"  verified   {len(manifest.checks)} changes, the largest by {worst.max_relative_error:.1e} ({where})")
    losses = [(program.loss, program.part) for program in manifest.programs if program.loss is not None]
    if losses:
        loss, part = max(losses, key=lambda measured: measured[0].rms_relative_error)
        print(f"  loss       at most {loss.rms_relative_error:.1e} of the float32 export's outputs, rms ({part})")
    if manifest.quantization is not None:
        print(f"  quantized  {describe_quantization(manifest.quantization)}")
    width = max(len(program.name) for program in manifest.programs)
    for program in manifest.programs:
        print(f"  {program.name:<{width}}  {program.file}, error against PyTorch {program.max_relative_error:.1e}")
        if tensors:
            for sign, specs in (("<-", program.inputs), ("->", program.outputs)):
                for spec in specs:
                    print(f"      {sign} {_describe(spec)}")


def _describe(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} ({', '.join(str(dim) for dim in tensor.shape)})"
