"""Compiles the variants: every one a manifest over programs that share one file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.compile import (
    FUSED,
    ProgramGraph,
    compile_program,
    fuse_programs,
    load_program,
    one_picture,
)
from controlrt.compiler.flops import count_flops
from controlrt.compiler.weights import WeightStore
from controlrt.engines.backends import BACKENDS
from controlrt.perf.models import CONTROL
from controlrt.perf.variants import Variant
from controlrt.runtime.bundle import Bundle, digest_files
from controlrt.runtime.errors import BuildError
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.manifest import Fusion, Program
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import Progress

PARTS = (f"controlnet.{CONTROL}", "unet")
"""The programs of a step, in order."""


class GraphCounts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one guided step is made of, ControlNet and UNet together."""

    nodes: int
    matmuls: int
    """MatMul and Gemm nodes."""
    flops: int
    """Of matrix products, a multiply-add being two."""

    def __add__(self, other: GraphCounts) -> GraphCounts:
        return GraphCounts(
            nodes=self.nodes + other.nodes, matmuls=self.matmuls + other.matmuls, flops=self.flops + other.flops
        )


NOTHING = GraphCounts(nodes=0, matmuls=0, flops=0)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A variant ready to run: ``manifest`` names programs below ``directory``."""

    directory: Path
    manifest: Path
    counts: GraphCounts


def prepare_graphs(exported: Bundle, variants: Sequence[Variant], directory: Path) -> dict[str, Prepared]:
    """Compiles ``variants`` into ``directory``, which is empty; by name. PyTorch's have no graphs and are left out.

    Plain variants run the files of the export. All others go through the compiler's weight store, together, so a
    tensor that many of them have is stored once.

    Raises:
        BuildError: a pass that cannot handle a graph. (A build would leave it out, but then it would measure nothing.)
    """
    compiled = [(variant, variant.backend) for variant in variants if variant.backend is not None]
    results: list[tuple[Variant, BackendName, list[Program], GraphCounts]] = []
    (directory / "programs").mkdir(parents=True)
    with WeightStore(directory / "programs") as store, Progress("compile", len(compiled)) as progress:
        chains = {backend: _Chain(exported, backend, store) for _, backend in compiled}
        for variant, backend in compiled:
            progress.start(variant.name)
            results.append((variant, backend, *chains[backend].advance(variant)))
    files = digest_files(directory)
    prepared = {}
    for variant, backend, programs, counts in results:
        manifest = msgspec.structs.replace(
            exported.manifest,
            backend=backend,
            fusion=Fusion(part=FUSED, controls=(CONTROL,)) if variant.fused else None,
            programs=tuple(programs),
            files=exported.manifest.files if variant.is_plain else files,
        )
        file = directory / f"{variant.name}.json"
        file.write_bytes(msgspec.json.encode(manifest))
        prepared[variant.name] = Prepared(
            directory=exported.path if variant.is_plain else directory, manifest=file, counts=counts
        )
    return prepared


class _Chain:
    """The step's programs on their way through one backend's passes. Variants come in the order of their passes."""

    def __init__(self, exported: Bundle, backend: BackendName, store: WeightStore) -> None:
        self._exported, self._backend, self._store = exported, backend, store
        self._profile = exported.manifest.profile
        self._passes = BACKENDS[backend].passes
        self._done = 0
        self._programs = self._load()

    def advance(self, variant: Variant) -> tuple[list[Program], GraphCounts]:
        """The variant's programs, written, and what its step is made of."""
        if variant.cut:
            return self._cut(variant)
        programs, counts = [], NOTHING
        for each in self._programs.values():
            self._run_passes(each, variant.passes)
            counts += count(each.model.graph, self._profile)
            program = msgspec.structs.replace(each.program, stage="step")
            if not variant.is_plain:
                file = f"{variant.name}.{program.name}.onnx"
                self._store.save(each.model, file)
                program = msgspec.structs.replace(program, file=f"programs/{file}")
            programs.append(program)
        self._done = variant.passes
        return programs, counts

    def _load(self) -> dict[str, ProgramGraph]:
        programs = (self._exported.manifest.program(part) for part in PARTS)
        return {
            program.part: ProgramGraph(program=program, model=load_program(program, self._exported.path, self._profile))
            for program in programs
        }

    def _run_passes(self, exported: ProgramGraph, until: int) -> None:
        for each in self._passes[self._done : until]:
            try:
                each(exported.model)
            except Exception as error:  # they share no class
                name = type(each).__name__
                raise BuildError(
                    f"{self._backend}: pass {name} cannot handle {exported.program.name}: {error}"
                ) from error
        RemoveUnusedNodesPass()(exported.model)

    def _cut(self, variant: Variant) -> tuple[list[Program], GraphCounts]:
        """By the compiler's own entry, so these are the programs that a bundle would hold."""
        sources = self._load()
        if variant.fused:
            fused = fuse_programs(sources["unet"], {CONTROL: sources[f"controlnet.{CONTROL}"]})
            sources = {fused.program.part: fused}
        programs, counts = [], NOTHING
        for source in sources.values():
            for compiled in compile_program(source.program, source.model, self._profile, self._passes):
                file = f"{variant.name}.{compiled.program.name}.onnx"
                self._store.save(compiled.model, file)
                programs.append(msgspec.structs.replace(compiled.program, file=f"programs/{file}"))
                if compiled.program.stage == "step":
                    counts += count(compiled.model.graph, self._profile)
        return programs, counts


def count(graph: ir.Graph, profile: ShapeProfile) -> GraphCounts:
    """Counts ``graph`` for one guided picture."""
    return GraphCounts(
        nodes=len(graph),
        matmuls=sum(node.op_type in ("MatMul", "Gemm") for node in graph),
        flops=count_flops(graph, one_picture(profile)).total,
    )
