"""What each float32 island of the float16 graphs is worth, on real graphs.

    python perf/precision_islands.py --model sd15 --output perf/results/precision-islands-sd15.json

ONNX Runtime on the CPU runs float16 graphs in float32 and leaves out roundings between operators. So the graphs are
rewritten: float32 throughout, and rounded to float16 and back wherever the float16 graph has a float16 value, which is
what a GPU does that stores float16 and accumulates in float32. Errors are of each program's outputs against the float32
export, root mean square relative to the output's, on seeded inputs; the worst output counts. What happens inside
LayerNormalization and Attention is float32 here whatever the islands are.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from controlrt.compiler.compile import input_labels, load_program, one_picture
from controlrt.compiler.graph import constant, new_initializer
from controlrt.compiler.passes.half_precision import ISLANDS, HalfPrecision
from controlrt.compiler.reference import Feeds, Reference, rms_error
from controlrt.engines.build import export_programs
from controlrt.perf.graphs import PARTS
from controlrt.perf.machine import commit, installed_versions, this_machine
from controlrt.perf.models import CONTROL, MODELS, prepare_model
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.profile import ShapeProfile

FULL, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
MEASURED = (*PARTS, "text_encoder", "vae_decoder")
TIMESTEP = 997
"""An early one, where the arguments of the sinusoids are largest; not a multiple of what float16 can count by."""
CASES = {
    "all four": ISLANDS,
    **{f"without {name}": tuple(n for n in ISLANDS if n != name) for name in ISLANDS},
    "none": (),
}
_MOVES = frozenset(("Reshape", "Transpose", "Split", "Slice", "Concat", "Gather", "Unsqueeze", "Squeeze", "Identity"))


def emulated(half: ir.Model) -> ir.Model:
    """``half``, as ``HalfPrecision`` gives it, in float32 with every rounding spelled out."""
    model = half.clone()
    graph = model.graph
    wide: dict[ir.Value, ir.Value] = {}
    for value in graph.inputs:
        if value.dtype == HALF:
            value.type = ir.TensorType(FULL)
    for node in tuple(graph):
        for index, value in enumerate(node.inputs):
            tensor = constant(value)
            if value is not None and tensor is not None and value.dtype == HALF:
                if value not in wide:
                    wide[value] = new_initializer(graph, f"{value.name}.wide", _widened(tensor))
                node.replace_input_with(index, wide[value])
        for output in node.outputs:
            if output.dtype != HALF:
                continue
            output.type = ir.TensorType(FULL)
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", FULL)
            if node.op_type not in _MOVES:
                _round(output)
    return model


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def widened() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32))

    return ir.LazyTensor(widened, dtype=FULL, shape=ir.Shape(tensor.shape.numpy()))


def _round(value: ir.Value) -> None:
    """Everything that reads ``value`` reads it rounded."""
    producer = value.producer()
    assert producer is not None
    down = ir.node("Cast", [value], {"to": HALF}, name=f"{value.name}.rounded")
    up = ir.node("Cast", [down.outputs[0]], {"to": FULL}, name=f"{value.name}.widened")
    for node, dtype in ((down, HALF), (up, FULL)):
        node.outputs[0].name, node.outputs[0].shape = node.name, value.shape
        node.outputs[0].type = ir.TensorType(dtype)
    name = value.name
    value.replace_all_uses_with(up.outputs[0], replace_graph_outputs=True)
    down.replace_input_with(0, value)
    producer.append([down, up])
    if up.outputs[0].is_graph_output():
        value.name, up.outputs[0].name = f"{name}.exact", name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, profile = prepare_model(arguments.model), ShapeProfile.parse("512x512")
    source = export_programs(str(model.model), {CONTROL: str(model.controlnet)}, profile)
    manifest = read_manifest(source)
    errors: dict[str, dict[str, float]] = {}
    with Reference(one_picture(profile)) as reference:
        for name in MEASURED:
            graph = load_program(manifest.program(name), source, profile)
            feeds = reference.feeds(graph)
            if "timestep" in feeds:
                feeds["timestep"][:] = TIMESTEP
            expected = reference.run(graph, feeds)
            errors[name] = {}
            for case, islands in CASES.items():
                half = graph.clone()
                HalfPrecision(input_labels(graph), islands)(half)
                found = reference.run(emulated(half), _rounded(feeds))
                errors[name][case] = max(rms_error(found[output], expected[output]) for output in expected)
                print(f"{name:<20} {case:<24} {errors[name][case]:.1e}", flush=True)
    report = {
        "benchmark": "precision-islands",
        "model": arguments.model,
        "command": shlex.join(["python", *sys.argv]),
        "machine": msgspec.to_builtins(this_machine()),
        "commit": msgspec.to_builtins(commit(Path(__file__).parent)),
        "versions": installed_versions(),
        "rms_relative_error": errors,
    }
    if arguments.output:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _rounded(feeds: Feeds) -> Feeds:
    """Residuals arrive in float16."""
    return {
        name: value.astype(np.float16).astype(np.float32) if name.startswith("residual_") else value
        for name, value in feeds.items()
    }


if __name__ == "__main__":
    main()
