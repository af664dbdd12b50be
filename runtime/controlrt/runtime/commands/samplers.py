"""List the samplers that --scheduler takes."""

from __future__ import annotations

import argparse

from controlrt.runtime.samplers import ALIASES, SAMPLERS, SUFFIXES, known_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Prints every familiar name, the schedules that may follow it, its diffusers class, and what a call may give."""
    del arguments
    names = known_names()
    print(f"{'name':<18} {'diffusers class, a name too':<32} {'may be followed by':<52} a call may give")
    for alias, (cls, _) in ALIASES.items():
        schedules = " | ".join(suffix for suffix in SUFFIXES if f"{alias} {suffix}" in names)
        takes = ", ".join(sorted(SAMPLERS[cls].takes))
        print(f"{alias:<18} {cls:<32} {f'[{schedules}]' if schedules else '':<52} {takes}".rstrip())
    return 0
