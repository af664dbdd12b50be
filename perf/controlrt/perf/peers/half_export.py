"""The plain export in float16: what a GPU is given by those who do not compile."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.compile import input_labels, load_program
from controlrt.compiler.passes.half_precision import HalfPrecision
from controlrt.compiler.weights import WeightStore
from controlrt.perf.models import bench_directory
from controlrt.runtime.bundle import Bundle, digest_files, write_manifest
from controlrt.runtime.manifest import MANIFEST_NAME, TensorSpec
from controlrt.runtime.storage import atomic_directory, lock


def in_half(exported: Bundle) -> Bundle:
    """The export with every program in float16 but those that would overflow; made on first use and kept."""
    target = bench_directory() / "half" / exported.manifest.key
    with lock(target):
        if not (target / MANIFEST_NAME).is_file():
            with atomic_directory(target) as partial:
                _write(exported, partial)
    return Bundle.open(target, verify=False)


def _write(exported: Bundle, target: Path) -> None:
    manifest = exported.manifest
    (target / "programs").mkdir()
    programs = []
    with WeightStore(target / "programs") as weights:
        for program in manifest.programs:
            model = load_program(program, exported.path, manifest.profile)
            if not (manifest.model.vae_float32 and program.name.startswith("vae")):
                HalfPrecision(input_labels(model))(model)
                RemoveUnusedNodesPass()(model)  # the float32 weights
            weights.save(model, Path(program.file).name)
            inputs = tuple(map(_typed, program.inputs, model.graph.inputs))
            outputs = tuple(map(_typed, program.outputs, model.graph.outputs))
            programs.append(msgspec.structs.replace(program, inputs=inputs, outputs=outputs))
    for file in manifest.files:
        if not file.startswith("programs/"):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(exported.path / file, target / file)
    files = digest_files(target)
    write_manifest(target, msgspec.structs.replace(manifest, programs=tuple(programs), files=files))


def _typed(spec: TensorSpec, value: ir.Value) -> TensorSpec:
    half = value.dtype == ir.DataType.FLOAT16
    return msgspec.structs.replace(spec, dtype="float16") if half else spec
