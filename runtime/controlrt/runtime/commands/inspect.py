"""Show what a bundle holds."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.manifest import TensorSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", action="store_true", help="print the whole manifest")
    parser.add_argument("--tensors", action="store_true", help="list every program's inputs and outputs")


def run(arguments: argparse.Namespace) -> int:
    """Checks the bundle and prints its manifest."""
    bundle = Bundle.open(arguments.bundle)
    manifest = bundle.manifest
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode())
        return 0
    size = sum(bundle.file(name).stat().st_size for name in manifest.files)
    print(f"{bundle.path}: {len(manifest.files)} files, {size / 2**20:.1f} MiB, all as built")
    print(f"  model      {manifest.model.source}")
    for control in manifest.controls:
        annotator = bundle.hint(control.name).annotator
        made = f"pictures by: controlrt annotate {annotator}" if annotator else "pictures of its own kind"
        print(f"  control    {control.name} ({control.layers} residuals; {made})")
    print(f"  profile    {manifest.profile}, batch {manifest.profile.batch}")
    print(f"  backend    {manifest.backend}, {manifest.precision}")
    print(f"  built      {manifest.provenance.created} by: {manifest.provenance.command}")
    for program in manifest.programs:
        print(f"  {program.name:<20} {program.file:<32} error against PyTorch {program.max_relative_error:.1e}")
        if arguments.tensors:
            for sign, tensors in (("<-", program.inputs), ("->", program.outputs)):
                for tensor in tensors:
                    print(f"      {sign} {_describe(tensor)}")
    return 0


def _describe(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} ({', '.join(str(dim) for dim in tensor.shape)})"
