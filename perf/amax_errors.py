"""What rounding the layers' inputs costs by ``--amax``, in int8 and in fp8, by the histograms of a calibration.

    python perf/amax_errors.py statistics.safetensors --output perf/results/amax-errors-demo.json

Errors are root mean squares relative to the values, at all timesteps alike; of each method the median layer, the
layer that nine tenths of all are better than, and the worst.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import msgspec
import numpy as np

from controlrt.compiler.quantization.arithmetic import FORMATS
from controlrt.compiler.quantization.statistics import Statistics
from controlrt.compiler.quantization.thresholds import amax_of, expected_error, methods_of
from controlrt.perf.machine import commit, installed_versions

SHARES = {"median": 0.5, "ninth_tenth": 0.9, "worst": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    statistics = Statistics.load(arguments.statistics)
    layers = [layer for part in statistics.layers.values() for layer in part.values() if layer.histogram.any()]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, number_format in FORMATS.items():
        found[name] = {}
        for method in methods_of(number_format):
            errors = [expected_error(layer, amax_of(layer, method, number_format), number_format) for layer in layers]
            found[name][method] = {share: float(np.quantile(errors, at)) for share, at in SHARES.items()}
            print(f"{name} {method:<18}", *(f"{error:.4f}" for error in found[name][method].values()), flush=True)
    report = {
        "benchmark": "amax-errors",
        "data": statistics.about.data,
        "layers": len(layers),
        "command": shlex.join(["python", *sys.argv]),
        "commit": msgspec.to_builtins(commit(Path(__file__).parent)),
        "versions": installed_versions(),
        "rms_relative_error": found,
    }
    if arguments.output:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    main()
