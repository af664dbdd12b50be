"""Carries a traced model to a GPU host, where tracing would take minutes that somebody pays for.

    python perf/carry_export.py pack sd15 -o sd15-export       # here: a few megabytes, without the weights
    python perf/carry_export.py unpack sd15 sd15-export        # there: the export lies in the cache, as if traced there

The weights of an export are the checkpoint's, some of them transposed; only constants that are neither are carried. The
model is one of ``controlrt bench --model``; its checkpoint is there already or is made. Unpacked files are compared
with the digests of those that were traced.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from safetensors import safe_open

from controlrt.export.exporter import TOOLS, ExportOptions, export_key, resolve_sources
from controlrt.perf.models import BenchModel, prepare_model
from controlrt.runtime.bundle import Bundle, read_manifest, write_manifest
from controlrt.runtime.errors import BuildError
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.storage import atomic_directory, cache_root, sha256_file

RECIPE, REST = "weights.json", "constants.npz"
DATA = ".onnx.data"


def pack(export: Path, model: BenchModel, target: Path) -> None:
    """Writes ``export`` without its weights, and where each of them is found in the checkpoint."""
    found = {digest: place for file in _checkpoint(model) for digest, place in _digests(file, _root(model))}
    recipe: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for file in sorted((export / "programs").glob("*.onnx")):
        places = []
        for value in ir.load(file).graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            content = tensor.numpy().tobytes()
            place = found.get(hashlib.sha256(content).hexdigest())
            if place is None:
                name = f"{file.stem}.{tensor.offset}"
                constants[name] = np.frombuffer(content, np.uint8)
            places.append({"offset": tensor.offset, "from": place or ["", name, False]})
        size = file.with_name(file.stem + DATA).stat().st_size
        recipe[file.stem] = {"size": size, "places": places}
    shutil.copytree(export, target, ignore=shutil.ignore_patterns(f"*{DATA}"))
    (target / RECIPE).write_text(json.dumps(recipe))
    np.savez_compressed(target / REST, **constants)


def unpack(packed: Path, model: BenchModel, profile: ShapeProfile) -> Path:
    """Makes the export whole in the cache; returns where it lies.

    Raises:
        BuildError: the checkpoint is another than it was packed with.
    """
    options = ExportOptions(model=model.source, controlnets=dict(model.controls), profile=profile)
    versions = {tool: importlib.metadata.version(tool) for tool in TOOLS}
    key = export_key(options, resolve_sources(options), versions)
    recipe = json.loads((packed / RECIPE).read_text())
    constants = dict(np.load(packed / REST))
    target = cache_root() / "exports" / key
    if target.is_dir():
        return target
    with atomic_directory(target) as partial, ThreadPoolExecutor() as threads:
        shutil.copytree(packed, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECIPE, REST))
        programs = partial / "programs"
        files = {programs / f"{name}{DATA}": each for name, each in recipe.items()}
        list(threads.map(lambda item: _fill(*item, constants, _root(model)), files.items()))
        manifest = read_manifest(partial)
        digests = threads.map(lambda name: sha256_file(partial / name), manifest.files)
        for (name, expected), digest in zip(manifest.files.items(), digests, strict=True):
            if digest != expected:
                raise BuildError(f"{name} is not as it was traced: the checkpoint of {model.name} is another one")
        write_manifest(partial, msgspec.structs.replace(manifest, key=key))
    Bundle.open(target, verify=False)
    return target


def _fill(file: Path, recipe: dict[str, Any], constants: dict[str, Any], root: Path) -> None:
    with file.open("wb") as data, ExitStack() as stack:
        data.truncate(recipe["size"])
        opened: dict[str, Any] = {}
        for place in recipe["places"]:
            source, name, transposed = place["from"]
            if source and source not in opened:
                opened[source] = stack.enter_context(safe_open(root / source, "numpy"))
            value = _float32(opened[source].get_tensor(name)) if source else constants[name]
            data.seek(place["offset"])
            data.write(np.ascontiguousarray(value.T if transposed else value).tobytes())


def _digests(file: Path, root: Path) -> Iterator[tuple[str, list[Any]]]:
    """Of every tensor and its transpose, and where it is found."""
    source = str(file.relative_to(root))
    with safe_open(file, "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            value = _float32(tensors.get_tensor(name))
            if value.ndim == 2:
                yield hashlib.sha256(np.ascontiguousarray(value.T).tobytes()).hexdigest(), [source, name, True]
            yield hashlib.sha256(value.tobytes()).hexdigest(), [source, name, False]


def _float32(value: Any) -> Any:
    """As models are loaded to be traced."""
    return value.astype(np.float32) if value.dtype == np.float16 else value


def _root(model: BenchModel) -> Path:
    return Path(model.source).parent


def _checkpoint(model: BenchModel) -> list[Path]:
    return sorted(file for file in _root(model).rglob("*.safetensors") if ".fp16." not in file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pack", "unpack"):
        command = commands.add_parser(name)
        command.add_argument("model", help="one that controlrt bench --model takes by name")
        command.add_argument("--profile", default="512x512")
        command.add_argument("--batch", default="1")
    commands.choices["pack"].add_argument("-o", "--output", type=Path, required=True)
    commands.choices["unpack"].add_argument("packed", type=Path)
    arguments = parser.parse_args()
    model = prepare_model(arguments.model)
    profile = ShapeProfile.parse(arguments.profile, arguments.batch)
    if arguments.command == "unpack":
        print(unpack(arguments.packed, model, profile))
        return
    from controlrt.engines.build import export_programs

    pack(export_programs(model.source, model.controls, profile), model, arguments.output)


if __name__ == "__main__":
    main()
