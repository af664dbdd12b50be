"""What the layers that stay out of int8 would cost and save in it, group by group, on the demo model.

    python perf/kept_layers.py --calibration statistics.safetensors --output perf/results/kept-layers-demo.json

Each group is brought to int8 by itself, in the UNet and the ControlNets, all else staying in float32, and draws the
pictures that the calibration left out. What layers of the steps read is known from the calibration; what those before
the loop read is listened to here, in float32. Times are of every program that has a layer of the group, in float32 and
with the group in int8 in turns, on what it read while pictures were drawn.
"""

from __future__ import annotations

import argparse
import shlex
import statistics as averages
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.compile import ProgramGraph, compile_program, load_program
from controlrt.compiler.passes.quantize import Quantize
from controlrt.compiler.quantization.arithmetic import REDUCED_LEVELS
from controlrt.compiler.quantization.layers import layers_of
from controlrt.compiler.quantization.statistics import Statistics
from controlrt.compiler.quantization.thresholds import DEFAULT_METHODS, amax_of
from controlrt.compiler.weights import WeightStore
from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines.backends import BACKENDS
from controlrt.engines.build import export_programs
from controlrt.engines.quantization.choice import compile_part, reduces_range, unquantized_bundle
from controlrt.engines.quantization.layer_choice import fitting
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.engines.quantization.quality_gate import measure_quality
from controlrt.engines.quantization.replay import replay_latents
from controlrt.engines.quantization.swapped_program import with_program
from controlrt.perf.machine import commit, installed_versions, this_machine
from controlrt.runtime.bundle import Bundle, read_manifest
from controlrt.runtime.executors import HostExecutor, open_host_executor
from controlrt.runtime.executors.base import Arrays, Launch
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.profile import ShapeProfile

GROUPS = {
    "hint encoder": ".controlnet_cond_embedding.",
    "time embedding": ".time_emb",
    "first convolution": ".conv_in",
    "last convolution": ".conv_out",
    "shortcuts": ".conv_shortcut",
}
"""Groups of layers that stay as they are, and what is in their names; a layer is of the first that fits."""
RUNS = 15
"""Of each program, in float32 and in int8."""


def group_of(layer: str) -> str | None:
    """The group of a layer, by its name; None where it has none."""
    return next((group for group, pattern in GROUPS.items() if pattern in layer), None)


class Listener(HostExecutor):
    """Runs programs in executors that stay open, and remembers what they read.

    Args:
        bundle: where all of them are.
        rest: what runs them.
        own: what runs some of them instead.
        programs: which.
    """

    def __init__(
        self, bundle: Bundle, rest: HostExecutor, own: HostExecutor | None = None, programs: Sequence[str] = ()
    ) -> None:
        super().__init__(bundle)
        self._executors = dict.fromkeys(programs, own or rest)
        self._rest = rest
        self.read: dict[str, list[Arrays]] = {}
        """By program: of those before the loop every run, of the others the memory that they are bound to."""

    def of(self, program: str) -> HostExecutor:
        """What runs a program."""
        return self._executors.get(program, self._rest)

    def load(self, program: str) -> None:
        """See ``Executor``."""
        self.of(program).load(program)

    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See ``Executor``."""
        self.read.setdefault(program, []).append({name: array.copy() for name, array in inputs.items()})
        return self.of(program).run(program, inputs)

    def bind_call(self, program: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """See ``HostExecutor``."""
        self.read.setdefault(program, [inputs])
        return self.of(program).bind_call(program, inputs, outputs)

    def close(self) -> None:
        """The executors are not its own."""


def heard_amax(file: Path, model: ir.Model, read: Sequence[Arrays], group: str) -> dict[str, float]:
    """The largest magnitude that each layer of a group reads in a program.

    Args:
        file: of the program, its weights beside it.
        model: its graph, which is changed.
        read: what it was given, run by run.
        group: which layers.
    """
    layers = {layer.name: layer.input for layer in layers_of(model.graph) if group_of(layer.name) == group}
    known = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    model.graph.outputs.extend(value for value in dict.fromkeys(layers.values()) if value.name not in known)
    session = open_session(file, model=ir.to_proto(model).SerializeToString())
    names = [output.name for output in session.get_outputs()]
    found = dict.fromkeys(layers, 0.0)
    for inputs in read:
        values = {**inputs, **dict(zip(names, session.run(names, dict(inputs)), strict=True))}
        for layer, value in layers.items():
            found[layer] = max(found[layer], float(np.abs(values[value.name or ""]).max()))
    return found


def milliseconds(pairs: Sequence[tuple[HostExecutor, str, Arrays]]) -> list[float]:
    """The median time of each, in turns, after a first run that nobody counts."""
    taken: list[list[float]] = [[] for _ in pairs]
    for turn in range(RUNS + 1):
        for seconds, (executor, program, inputs) in zip(taken, pairs, strict=True):
            started = perf_counter()
            executor.run(program, inputs)
            if turn:
                seconds.append(perf_counter() - started)
    return [averages.median(seconds) * 1e3 for seconds in taken]


class Measurement:
    """One bundle in float32, and groups of its layers in int8.

    Args:
        statistics: of its layers.
        backend_name: what runs it.
        exported: the manifest of the export.
        graphs: its programs.
        bundle: in float32.
        store: where its weights lie.
        listener: what drew the unseen pictures.
    """

    def __init__(
        self,
        statistics: Statistics,
        backend_name: BackendName,
        exported: Manifest,
        graphs: Sequence[ProgramGraph],
        bundle: Bundle,
        store: WeightStore,
        listener: Listener,
    ) -> None:
        self.statistics, self.backend, self.exported = statistics, BACKENDS[backend_name], exported
        self.graphs, self.bundle, self.store, self.listener = graphs, bundle, store, listener
        options = QuantizationOptions(statistics=Path())
        self.levels = REDUCED_LEVELS if reduces_range(options, self.backend) else None

    def amax(self, graph: ProgramGraph, group: str) -> dict[str, float]:
        """The thresholds of one part's layers that are of a group."""
        names = {layer.name for layer in layers_of(graph.model.graph) if group_of(layer.name) == group}
        seen = self.statistics.layers.get(graph.program.name, {})
        found = {name: amax_of(seen[name], DEFAULT_METHODS["int8"]) for name in names & seen.keys()}
        if found.keys() == names:
            return found
        passes = tuple(each for each in self.backend.passes if not getattr(each, "float32_only", False))
        for each in compile_program(graph.program, graph.model, self.exported.profile, passes):
            name = each.program.name
            if each.program.stage == "step" or name not in self.listener.read:
                continue
            file = self.store.directory / f"heard.{name}.onnx"
            self.store.save(each.model, file.name)
            found |= heard_amax(file, ir.load(file), self.listener.read[name], group)
        return {name: amax for name, amax in found.items() if amax > 0}

    def measure(self, group: str) -> dict[str, object]:
        """What a group costs and saves."""
        changed, programs, layers = self.bundle, [], 0
        for graph in self.graphs:
            amax = self.amax(graph, group)
            if not amax:
                continue
            layers += len(amax)
            quantize = Quantize(amax, inputs=self.backend.int8_inputs, weight_levels=self.levels)
            for each in compile_part(graph, self.exported, self.backend, "fp32", quantize):
                if each.program.precision == "int8":
                    file = f"{group.replace(' ', '_')}.{each.program.name}.onnx"
                    self.store.save(each.model, file)
                    changed = with_program(changed, msgspec.structs.replace(each.program, file=f"programs/{file}"))
                    programs.append(each.program.name)
        times = {}
        with open_host_executor(changed) as executor:
            both = Listener(changed, self.listener.of(""), executor, programs)
            quality = measure_quality(changed, self.statistics.unseen, both)
            for program in programs:
                inputs = self.listener.read[program][0]
                before, after = milliseconds([(each.of(program), program, inputs) for each in (self.listener, both)])
                times[program] = {"float32_ms": before, "int8_ms": after}
        return {
            "layers": layers,
            "final_latent_error": quality.latent_errors[-1],
            "psnr_db": quality.psnr_db,
            "lowest_psnr_db": quality.lowest_psnr_db,
            "ssim": quality.ssim,
            "programs": times,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--backend", choices=("openvino", "onnxruntime"), default="openvino")
    parser.add_argument("--pictures", type=int, help="how many of the unseen ones are drawn; all where not given")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    profile = ShapeProfile.parse("512x512", "1-4")
    source = export_programs(str(MODEL_DIR), {name: str(path) for name, path in CONTROLNETS.items()}, profile)
    exported = read_manifest(source)
    statistics = fitting(Statistics.load(arguments.calibration), exported, profile)
    statistics = replace(statistics, unseen=statistics.unseen[: arguments.pictures])
    graphs = [
        ProgramGraph(program=program, model=load_program(program, source, profile)) for program in exported.programs
    ]
    groups: dict[str, dict[str, object]] = {}
    with (
        unquantized_bundle(arguments.backend, exported, source, graphs, "fp32") as (bundle, store),
        open_host_executor(bundle) as inner,
    ):
        listener = Listener(bundle, inner)
        with ControlNetPipeline(bundle, executor=listener) as pipeline:
            for case in statistics.unseen:
                replay_latents(pipeline, case.arguments, case.hints)
        measurement = Measurement(statistics, arguments.backend, exported, graphs, bundle, store, listener)
        for group in GROUPS:
            groups[group] = measurement.measure(group)
            print(group, groups[group], flush=True)
    report = {
        "benchmark": "kept-layers",
        "model": "demo",
        "backend": arguments.backend,
        "reduced_range": measurement.levels is not None,
        "pictures": sum(len(case.pictures) for case in statistics.unseen),
        "command": shlex.join(["python", *sys.argv]),
        "machine": msgspec.to_builtins(this_machine()),
        "commit": msgspec.to_builtins(commit(Path(__file__).parent)),
        "versions": installed_versions(),
        "groups": groups,
    }
    if arguments.output:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    main()
