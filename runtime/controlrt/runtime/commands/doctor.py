"""Say what this machine can run and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys

from controlrt.runtime.storage import cache_root

RUNTIME = (
    "filelock",
    "msgspec",
    "numpy",
    "onnxruntime",
    "pillow",
    "tokenizers",
    "tqdm",
)
ANNOTATE = ("opencv-python-headless",)
EXPORT = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Prints versions, cores and capabilities; returns 1 where the runtime itself cannot work."""
    del arguments
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"controlrt {_version('controlrt')}, Python {platform.python_version()}, {platform.machine()}, {cores} cores")
    missing = [name for name in RUNTIME if _version(name) is None]
    for name in RUNTIME:
        print(f"  {'ok' if _version(name) else 'MISSING':<8}{name} {_version(name) or ''}".rstrip())
    can_export = all(_version(name) for name in EXPORT)
    for name in (*ANNOTATE, *EXPORT):
        print(f"  {'ok' if _version(name) else 'absent':<8}{name} {_version(name) or ''}".rstrip())
    if not missing:
        import onnxruntime

        print(f"  ONNX Runtime providers: {', '.join(onnxruntime.get_available_providers())}")
    print(f"  cache: {cache_root()}")
    print(f"run bundles:   {'yes' if not missing else 'no; pip install controlrt'}")
    print(f"build bundles: {'yes' if can_export else 'no; pip install controlrt[export]'}")
    print(f"Python: {sys.executable}")
    return 1 if missing else 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
