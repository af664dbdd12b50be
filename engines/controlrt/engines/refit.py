"""Gives the engines of a bundle other weights: of another checkpoint of the same shape, of LoRAs, or of their own.

The compiler transposes, joins, folds and rounds weights. So the new checkpoint goes through the same export and
compiler as the one that the engines were built from, and what comes out must be the same graph but for the values of
weights. Then each of them has a name by which TensorRT's refitter takes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import controlrt.compiler
import controlrt.engines
from controlrt.compiler.compile import FUSED, ProgramGraph, compile_program
from controlrt.compiler.weights import WeightStore
from controlrt.engines.backends import BACKENDS
from controlrt.engines.build import COMPILED, BuildOptions, export_sources, provenance, whole_bundle, with_sources
from controlrt.engines.exported_files import copy_files, exported_files
from controlrt.engines.parts import fused_controls, part_graphs, part_precision
from controlrt.engines.quality import measure_parts
from controlrt.engines.refit_options import RefitOptions, refittable_flavour, sources_of
from controlrt.engines.tensorrt.dialect import write_for_parser
from controlrt.engines.tensorrt.refitter import TensorRtRefitter
from controlrt.engines.tensorrt.structure import Structure, read_structure, structure_file, write_structure
from controlrt.runtime.bundle import Bundle, digest_files, read_manifest, write_manifest
from controlrt.runtime.errors import SourceError
from controlrt.runtime.manifest import MANIFEST_NAME, Manifest, Program
from controlrt.runtime.progress import Progress
from controlrt.runtime.storage import (
    atomic_directory,
    check_writable,
    lock,
    refuse_foreign_directory,
    sha256_tree,
)

_ANEW = "controlrt refit takes checkpoints of the same shape; build a bundle of this one with build-engines"


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """The bundle, and what was done for it."""

    bundle: Bundle
    programs: tuple[str, ...] | None
    """Whose engines were given other weights; None where the bundle was there already."""


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    """A program as it would be built now."""

    program: Program
    onnx: Path
    """What TensorRT's parser reads."""
    structure: Structure
    changed: list[str]
    """The weights that have other values than those of the engine."""


def refit(options: RefitOptions, command: str) -> Refitted:
    """Makes a bundle of the engines of ``options.bundle`` with other weights, unless ``options.output`` holds it.

    Raises:
        OutputError: the output cannot be written or holds something else.
        BundleError: the bundle is missing or damaged.
        UserError: it cannot be refitted, or not with what is named; a SourceError where shapes are others.
        DeviceError: no GPU, or one that does not run the engines.
        ExportFailedError: the export process failed.
        BuildError: TensorRT refuses the weights.
    """
    refuse_foreign_directory(options.output, MANIFEST_NAME)
    check_writable(options.output)
    bundle = Bundle.open(options.bundle)
    flavour = refittable_flavour(bundle, options)
    sources = sources_of(options, bundle.manifest)
    refitter = TensorRtRefitter(flavour)
    refitter.check(program.engine for program in bundle.manifest.programs if program.engine is not None)
    with lock(options.output):
        source = export_sources(sources)
        exported = read_manifest(source)
        folders = [*controlrt.compiler.__path__, *controlrt.engines.__path__]
        code = [sha256_tree(Path(folder), "*.py") for folder in folders]
        decisive = [bundle.manifest.key, exported.key, BACKENDS[flavour].versions(), code]
        key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        if found := whole_bundle(options.output, key):
            return Refitted(bundle=found, programs=None)
        with atomic_directory(options.output) as partial:
            (partial / COMPILED / "programs").mkdir(parents=True)
            (partial / "programs").mkdir()
            copy_files(exported, source, partial)
            programs, refitted = _refit_programs(bundle, sources, source, exported, partial, refitter)
            shutil.rmtree(partial / COMPILED)
            parts = {program.part for program in programs if program.name in refitted}
            manifest = msgspec.structs.replace(
                with_sources(exported, sources),
                key=key,
                backend=flavour,
                precision=bundle.manifest.precision,
                fusion=bundle.manifest.fusion,
                programs=programs,
                checks=tuple(check for check in bundle.manifest.checks if check.program not in parts),
                files=digest_files(partial),
                provenance=provenance(exported, BACKENDS[flavour], command),
                refitted_from=bundle.manifest.key,
            )
            write_manifest(partial, manifest)
    return Refitted(bundle=Bundle(options.output, manifest), programs=refitted)


def _refit_programs(
    bundle: Bundle, sources: BuildOptions, source: Path, exported: Manifest, target: Path, refitter: TensorRtRefitter
) -> tuple[tuple[Program, ...], tuple[str, ...]]:
    """Writes every engine, those whose weights are others refitted and the rest as they are.

    Returns:
        All manifest entries, and the names of those that were refitted.
    """
    manifest = bundle.manifest
    parts = _parts_to_refit(manifest, exported)
    with Progress("refit", 3 * len(parts) + 1) as progress:
        graphs = [each for each in part_graphs(source, exported, sources.fuse) if each.program.name in parts]
        compiled = {
            each.program.name: each
            for graph in graphs
            for each in _compile(graph, bundle, sources, exported, target / COMPILED, progress)
        }
        programs = _measured(compiled, manifest, graphs, exported, target / COMPILED, progress)
        written: list[Program] = []
        refitted: list[str] = []
        for part in dict.fromkeys(program.part for program in manifest.programs):
            if part in parts:
                progress.start(f"refit {part}")
            for program in (each for each in manifest.programs if each.part == part):
                new = compiled.get(program.name)
                if new is None or not (new.changed or _is_stripped(program)):
                    for file in (program.file, structure_file(program.file)):
                        shutil.copyfile(bundle.file(file), target / file)
                    written.append(program)
                    continue
                entry = msgspec.structs.replace(programs[program.name], file=program.file, engine=program.engine)
                plan = bundle.file(program.file)
                written.append(refitter.refit(entry, new.onnx, new.changed, plan, target / program.file))
                write_structure(target / structure_file(program.file), new.structure)
                refitted.append(program.name)
        progress.start("hash files")
    return tuple(written), tuple(refitted)


def _parts_to_refit(manifest: Manifest, exported: Manifest) -> set[str]:
    """The parts that were made of other files than the export has, or that have no weights yet."""
    old, new = manifest.provenance.sources, exported.provenance.sources
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    if [lora.weight for lora in manifest.model.loras] != [lora.weight for lora in exported.model.loras]:
        changed.add("model")
    fused = {control.part for control in manifest.controls if control.name in fused_controls(manifest)}
    found = {program.part for program in manifest.programs if _is_stripped(program)}
    for part in {program.part for program in manifest.programs}:
        kind, _, name = part.partition(".")
        if kind in ("controlnet", "adapter"):
            affected = part in changed
        elif kind == "ip_adapter":
            affected = not changed.isdisjoint((part, f"image_encoder.{name}"))
        else:  # made of the model, its LoRAs and the IP-Adapters
            affected = any(not each.startswith(("controlnet.", "adapter.", "image_encoder.")) for each in changed)
        if affected or (part == FUSED and not changed.isdisjoint(fused)):
            found.add(part)
    return found


def _compile(
    graph: ProgramGraph, bundle: Bundle, sources: BuildOptions, exported: Manifest, target: Path, progress: Progress
) -> Iterator[_Compiled]:
    """The programs of a part, compiled as ``build`` does it into ``target``.

    Raises:
        SourceError: they are others than the engines were built from.
    """
    manifest, part = bundle.manifest, graph.program.name
    progress.start(f"compile {part}")
    precision = part_precision(part, sources.precision, exported)
    with WeightStore(target / "programs", f"{part}.bin") as weights:
        made = compile_program(
            graph.program,
            graph.model,
            exported.profile,
            sources.passes,
            precision=precision,
            split=BACKENDS[sources.backend].device == "cuda",
            guided=exported.time_cond_proj_dim is None,
        )
        for each in made:
            weights.save(each.model, Path(each.program.file).name)
    names = [each.program.name for each in made]
    expected = [program.name for program in manifest.programs if program.part == part]
    if sorted(names) != sorted(expected):
        raise SourceError(f"{part} has the programs {', '.join(names)}, the bundle {', '.join(expected)}; {_ANEW}")
    for each in made:
        onnx, structure = write_for_parser(each.program.name, target / each.program.file)
        built = read_structure(bundle.file(structure_file(manifest.program(each.program.name).file)))
        if difference := built.difference(structure):
            raise SourceError(
                f"program {each.program.name}: {difference}{_other_versions(manifest, exported)}; {_ANEW}"
            )
        yield _Compiled(program=each.program, onnx=onnx, structure=structure, changed=built.changed(structure))


def _other_versions(manifest: Manifest, exported: Manifest) -> str:
    """The tools that an export was made with, where they are others than the bundle's; they change graphs too."""
    old, new = manifest.provenance.versions, exported.provenance.versions
    others = [f"{tool} {old[tool]}" for tool in new if tool in old and old[tool] != new[tool]]
    return f" (the bundle was built with {', '.join(others)})" if others else ""


def _measured(
    compiled: Mapping[str, _Compiled],
    manifest: Manifest,
    graphs: Sequence[ProgramGraph],
    exported: Manifest,
    directory: Path,
    progress: Progress,
) -> dict[str, Program]:
    """The compiled programs by name, with the loss of those whose weights changed where the bundle has it."""
    had_loss = {program.part for program in manifest.programs if program.loss is not None}
    measured = {each.program.part for each in compiled.values() if each.changed} & had_loss
    losses = {program.name: program.loss for program in manifest.programs}
    programs = tuple(
        msgspec.structs.replace(each.program, loss=losses[each.program.name]) for each in compiled.values()
    )
    files = dict.fromkeys((*exported_files(exported), *(program.file for program in programs)), "")
    onnx = msgspec.structs.replace(
        exported, backend=manifest.backend, precision=manifest.precision, programs=programs, files=files
    )
    wanted = [graph for graph in graphs if graph.program.name in measured]
    return {program.name: program for program in measure_parts(Bundle(directory, onnx), wanted, exported, progress)}


def _is_stripped(program: Program) -> bool:
    return program.engine is not None and program.engine.stripped
