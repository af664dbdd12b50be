"""What int8 gives attention in OpenVINO, and what it costs: a self-attention of Stable Diffusion 1.5 at 64x64 latents.

    python perf/attention_int8.py --output perf/results/attention-int8.json

Two rows, eight heads of 40 channels, 4,096 tokens; queries, keys and values normally distributed. All forms run in one
process in turns, A B C C B A; errors are root mean squares relative to float32's output. In int8 the scale of queries,
keys and values is that of five deviations, that of the softmax 1/16, and that of its numerator exp(s - max s) is 1.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as op

from controlrt.perf.machine import commit, installed_versions, this_machine

SHAPE = (2, 8, 4096, 40)
LARGEST, LARGEST_PROBABILITY = 5.0, 1 / 16
ROUNDS = 10
FORMS = {
    "float32": (None, None, "f32"),
    "bfloat16": (None, None, "bf16"),
    "queries and keys in int8, else bfloat16": ("int8", None, "bf16"),
    "all in int8, of the softmax": ("int8", "softmax", "bf16"),
    "all in int8, of its numerator": ("int8", "numerator", "bf16"),
}
"""Queries and keys, probabilities and values, and what all else is computed in."""


def rounded(value: openvino.Output, lowest: float, largest: float) -> openvino.Node:
    """To the 256 levels of 8 bits between two values, as what OpenVINO makes of QuantizeLinear and DequantizeLinear."""
    low, high = (op.constant(np.float32(end)) for end in (lowest, largest))
    return op.fake_quantize(value, low, high, low, high, 256)


def signed(value: openvino.Output) -> openvino.Node:
    """In int8, symmetric."""
    return rounded(value, -LARGEST * 128 / 127, LARGEST)


def attention(scores: str | None, probabilities: str | None) -> openvino.Model:
    """One form of it."""
    queries, keys, values = inputs = [op.parameter(SHAPE, np.float32) for _ in range(3)]
    if scores is None:
        return openvino.Model([op.scaled_dot_product_attention(queries, keys, values)], inputs)
    scale, last = op.constant(np.float32(SHAPE[-1] ** -0.5)), op.constant(np.array([3]))
    products = op.multiply(op.matmul(signed(queries), signed(keys), False, True), scale)
    if probabilities == "numerator":
        numerator = rounded(op.exp(op.subtract(products, op.reduce_max(products, last, True))), 0, 1)
        total = op.reduce_sum(numerator, last, True)
        return openvino.Model([op.divide(op.matmul(numerator, signed(values), False, False), total)], inputs)
    weights = op.softmax(products, -1)
    if probabilities == "softmax":
        weights, values = rounded(weights, 0, LARGEST_PROBABILITY), signed(values)
    return openvino.Model([op.matmul(weights, values, False, False)], inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(SHAPE, np.float32) for _ in range(3)]
    core, requests = openvino.Core(), {}
    for name, (scores, probabilities, precision) in FORMS.items():
        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        requests[name] = core.compile_model(attention(scores, probabilities), "CPU", options).create_infer_request()
    outputs: dict[str, NDArray[np.float32]] = {}
    for name, request in requests.items():
        request.infer(inputs, share_inputs=True)
        outputs[name] = np.array(request.get_output_tensor().data)
    times: dict[str, list[float]] = {name: [] for name in requests}
    for number in range(ROUNDS):
        for name in requests if number % 2 == 0 else reversed(requests):
            started = perf_counter()
            requests[name].infer(inputs, share_inputs=True)
            times[name].append(1e3 * (perf_counter() - started))
    expected = outputs["float32"]
    size = float(np.sqrt(np.mean(np.square(expected))))
    forms = {
        name: {
            "milliseconds": statistics.median(times[name]),
            "error": float(np.sqrt(np.mean(np.square(output - expected)))) / size,
        }
        for name, output in outputs.items()
    }
    for name, found in forms.items():
        print(f"{name:<42} {found['milliseconds']:7.1f} ms  {found['error']:.1e}")
    report = {
        "benchmark": "attention-int8",
        "command": shlex.join(["python", *sys.argv]),
        "machine": msgspec.to_builtins(this_machine()),
        "commit": msgspec.to_builtins(commit(Path(__file__).parent)),
        "versions": installed_versions(),
        "shape": SHAPE,
        "forms": forms,
    }
    if arguments.output:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    main()
