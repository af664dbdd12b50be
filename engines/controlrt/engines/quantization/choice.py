"""What a build in int8 or fp8 quantizes, and what the manifest says of it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from controlrt.compiler.compile import ProgramGraph, compile_program
from controlrt.compiler.passes.quantize import Quantize
from controlrt.compiler.quantization.arithmetic import REDUCED_LEVELS
from controlrt.compiler.quantization.statistics import Case, LayerStatistics, Statistics
from controlrt.compiler.weights import WeightStore
from controlrt.engines.backends import BACKENDS, Backend
from controlrt.engines.exported_files import copy_files, exported_files
from controlrt.engines.quantization.layer_choice import amax_by_part, choose_layers, in_part
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.engines.quantization.sensitivity import choose_blocks, keep_others, measure_blocks
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BuildError
from controlrt.runtime.machine import adds_in_32_bits
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.manifest import Manifest, Precision, Quality, Quantization, QuantizedBlock, QuantizedLayer
from controlrt.runtime.storage import sha256_file


@dataclass(frozen=True, kw_only=True)
class QuantizationChoice:
    """The layers, and why."""

    options: QuantizationOptions
    statistics: Statistics
    layers: tuple[QuantizedLayer, ...]
    blocks: tuple[QuantizedBlock, ...]
    cases: tuple[Case, ...]
    """For the quality gate."""
    backend: Backend
    fused: Mapping[str, str]
    """Parts of the ControlNets that are fused with the UNet, by control."""

    def quantize(self, part: str) -> Quantize | None:
        """The pass for one part, if any of its layers is to be in 8 bits."""
        amax = in_part(amax_by_part(self.layers), part, self.fused)
        seen = in_part(self.statistics.layers, part, self.fused)
        return _quantize(amax, seen, self.options, self.backend) if amax else None

    def record(self, quality: Quality) -> Quantization:
        """For the manifest."""
        return Quantization(
            precision=self.options.precision,
            statistics=sha256_file(self.options.statistics),
            method=self.options.amax_method,
            smoothing=self.options.smoothing,
            reduced_range=reduces_range(self.options, self.backend),
            unquantized=unquantized_precision(self.options, self.backend),
            budget=self.options.budget,
            layers=self.layers,
            blocks=self.blocks,
            quality=quality,
        )


def choose(
    statistics: Statistics,
    options: QuantizationOptions,
    backend_name: BackendName,
    exported: Manifest,
    source: Path,
    graphs: Sequence[ProgramGraph],
    fused: Mapping[str, str],
) -> QuantizationChoice:
    """Says which layers are brought to 8 bits; with a budget, measures blocks for it.

    Args:
        statistics: of these weights.
        options: what is asked for.
        backend_name: what runs the programs.
        exported: the manifest of the export.
        source: where it lies.
        graphs: its programs.
        fused: parts of the ControlNets that are fused with the UNet, by control.

    Raises:
        UserError: a pattern of layers to keep that fits none.
        BuildError: no layer is left, or no block within the budget.
    """
    backend = BACKENDS[backend_name]
    layers = choose_layers(statistics, options)
    blocks: Sequence[QuantizedBlock] = ()
    if options.budget is not None:
        precision = unquantized_precision(options, backend)
        with unquantized_bundle(backend_name, exported, source, graphs, precision) as (bundle, store):
            by_part = {each.program.name: each for each in graphs}

            def compile_step(part: str, amax: Mapping[str, float]) -> ProgramGraph:
                quantize = _quantize(amax, statistics.layers[part], options, backend)
                return next(
                    each
                    for each in compile_part(by_part[part], exported, backend, precision, quantize)
                    if each.program.stage == "step"
                )

            blocks = measure_blocks(bundle, store, layers, statistics.unseen, compile_step)
        blocks = choose_blocks(blocks, options.budget)
        layers = keep_others(layers, blocks)
        if all(layer.kept for layer in layers):
            raise BuildError(
                f"no block is faster in {options.precision} here within a quality budget of {options.budget:g}; raise "
                "--quality-budget, or build with another --precision"
            )
    return QuantizationChoice(
        options=options,
        statistics=statistics,
        layers=layers,
        blocks=tuple(blocks),
        cases=statistics.unseen,
        backend=backend,
        fused=fused,
    )


def _quantize(
    amax: Mapping[str, float], seen: Mapping[str, LayerStatistics], options: QuantizationOptions, backend: Backend
) -> Quantize:
    inputs = "fp8" if options.precision == "fp8" else backend.int8_inputs
    levels = REDUCED_LEVELS if reduces_range(options, backend) else None
    if options.smoothing is None:
        return Quantize(amax, inputs=inputs, weight_levels=levels)
    return Quantize(
        amax,
        inputs=inputs,
        weight_levels=levels,
        channel_amax={name: layer.channel_amax for name, layer in seen.items()},
        smoothing=options.smoothing,
    )


def reduces_range(options: QuantizationOptions, backend: Backend) -> bool:
    """Whether weights in int8 take 7 bits, as asked for, or as this machine's CPU needs it."""
    if options.precision != "int8":
        return False
    if options.reduce_range is not None:
        return options.reduce_range
    return backend.device == "cpu" and not adds_in_32_bits()


def unquantized_precision(options: QuantizationOptions, backend: Backend) -> Precision:
    """What all but the layers in 8 bits is computed in, as asked for, or as suits this machine."""
    return options.unquantized or backend.unquantized_precisions()[0]


def compile_part(
    graph: ProgramGraph, exported: Manifest, backend: Backend, precision: Precision, quantize: Quantize | None = None
) -> list[ProgramGraph]:
    """The programs of an exported part as a build makes them, with the layers of ``quantize`` in 8 bits."""
    return compile_program(
        graph.program,
        graph.model,
        exported.profile,
        backend.passes,
        precision=precision,
        quantize=quantize,
        guided=exported.time_cond_proj_dim is None,
    )


@contextlib.contextmanager
def unquantized_bundle(
    backend_name: BackendName, exported: Manifest, source: Path, graphs: Sequence[ProgramGraph], precision: Precision
) -> Iterator[tuple[Bundle, WeightStore]]:
    """A bundle with no layer in 8 bits to compare with, and where its weights lie; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="controlrt-quantization-") as directory:
        path = Path(directory)
        (path / "programs").mkdir()
        with WeightStore(path / "programs") as store:
            programs = []
            for graph in graphs:
                for compiled in compile_part(graph, exported, BACKENDS[backend_name], precision):
                    store.save(compiled.model, Path(compiled.program.file).name)
                    programs.append(compiled.program)
            copy_files(exported, source, path)
            files = dict.fromkeys((*exported_files(exported), *(program.file for program in programs)), "")
            manifest = msgspec.structs.replace(exported, backend=backend_name, programs=tuple(programs), files=files)
            yield Bundle(path, manifest), store
