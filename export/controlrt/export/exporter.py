"""From checkpoints to a directory of ONNX programs with a manifest, kept in the content-keyed cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from controlrt.export import checkpoint as checkpoints
from controlrt.runtime import bundle
from controlrt.runtime.annotators import annotator_named_in
from controlrt.runtime.errors import BundleError, ParameterError
from controlrt.runtime.manifest import (
    SCHEMA_VERSION,
    Control,
    Hint,
    Manifest,
    Model,
    Name,
    Program,
    Provenance,
    TextEncoder,
)
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import Progress
from controlrt.runtime.storage import atomic_directory, cache_root, lock, sha256_tree

if TYPE_CHECKING:
    from controlrt.export.programs import ProgramSpec

TOOLS = ("controlrt", "diffusers", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export. Sources are diffusers folders, single files or hub ids."""

    model: str
    controlnets: Mapping[str, str]
    profile: ShapeProfile

    def __post_init__(self) -> None:
        for name in self.controlnets:
            try:
                msgspec.convert(name, Name)
            except msgspec.ValidationError:
                allowed = "letters, digits, '.', '_' and '-', starting with a letter or digit"
                raise ParameterError("control name", name, allowed) from None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Where the ONNX programs lie, and whether they were there already."""

    path: Path
    cached: bool


def export(options: ExportOptions, command: str) -> Exported:
    """Exports unless the cache holds the same already.

    The key covers the contents of every checkpoint file, the profile, the exporter's own code and the versions of
    the tools that trace, so a change of any of them exports anew.

    Raises:
        SourceError: a checkpoint that cannot be found, loaded or is not supported.
        BuildError: a model that cannot be traced or whose ONNX differs from PyTorch.
    """
    model = checkpoints.resolve(options.model, "model")
    controlnets = {name: checkpoints.resolve(source, "ControlNet") for name, source in options.controlnets.items()}
    resolved = {"model": model} | {f"controlnet.{name}": path for name, path in controlnets.items()}
    sources = {name: _digest(checkpoints.digest_files(path)) for name, path in resolved.items()}
    versions = {tool: importlib.metadata.version(tool) for tool in TOOLS}
    inputs = {
        "sources": sources,
        "controls": [[name, annotator_named_in(name, source)] for name, source in options.controlnets.items()],
        "profile": msgspec.to_builtins(options.profile),
        "versions": versions,
        "schema": SCHEMA_VERSION,
        "exporter": sha256_tree(Path(__file__).parent, "*.py"),
    }
    key = _digest(inputs)
    target = cache_root() / "exports" / key
    with lock(target):
        with contextlib.suppress(BundleError):  # absent or damaged: it is made anew
            bundle.Bundle.open(target)
            return Exported(path=target, cached=True)
        with atomic_directory(target) as partial:
            provenance = Provenance(
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                command=command,
                sources=sources,
                versions=versions,
            )
            _export_into(partial, options, model, controlnets, key, provenance)
    return Exported(path=target, cached=False)


def _export_into(
    directory: Path, options: ExportOptions, model: Path, controlnets: dict[str, Path], key: str, provenance: Provenance
) -> None:
    from controlrt.export.programs import controlnet_program, text_encoder_program, unet_program, vae_programs
    from controlrt.export.trace import export_program

    with Progress("export", 3 + len(controlnets) + 1) as progress:
        progress.start("load checkpoint")
        loaded = checkpoints.load(model, controlnets)
        factor = loaded.vae_scale_factor
        specs: list[ProgramSpec] = [
            *(text_encoder_program(parts) for parts in loaded.text_encoders),
            *(controlnet_program(loaded, name, controlnet) for name, controlnet in loaded.controlnets.items()),
            unet_program(loaded),
            *vae_programs(loaded),
        ]
        progress.total = 1 + len(specs)
        (directory / "programs").mkdir()
        programs: list[Program] = []
        for spec in specs:
            progress.start(f"trace {spec.name}")
            programs.append(export_program(spec, options.profile, directory / "programs"))
    for parts in loaded.text_encoders:
        folder = directory / parts.name.replace("text_encoder", "tokenizer")
        folder.mkdir()
        parts.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (directory / "scheduler.json").write_text(json.dumps(loaded.scheduler_config, indent=2, default=str) + "\n")
    (directory / "hints").mkdir()
    for name, controlnet in loaded.controlnets.items():
        hint = Hint(
            annotator=annotator_named_in(name, options.controlnets[name]),
            channels=controlnet.config.conditioning_channels,
        )
        (directory / "hints" / f"{name}.json").write_bytes(msgspec.json.encode(hint) + b"\n")
    by_name = {program.name: program for program in programs}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        key=key,
        backend="onnxruntime",
        precision="fp32",
        profile=options.profile,
        model=Model(
            source=options.model,
            latent_channels=loaded.latent_channels,
            vae_scale_factor=factor,
            time_ids=loaded.time_ids,
            zero_empty_negative=loaded.zero_empty_negative,
            vae_float32=loaded.vae_float32,
        ),
        text_encoders=tuple(
            TextEncoder(
                program=parts.name,
                tokenizer=f"{parts.name.replace('text_encoder', 'tokenizer')}/tokenizer.json",
                max_length=parts.max_length,
                pad_token_id=parts.pad_token_id,
                bos_token_id=parts.bos_token_id,
                eos_token_id=parts.eos_token_id,
                pooled=parts.pooled,
            )
            for parts in loaded.text_encoders
        ),
        controls=tuple(
            Control(
                name=name,
                part=f"controlnet.{name}",
                source=options.controlnets[name],
                layers=len(by_name[f"controlnet.{name}"].outputs),
            )
            for name in controlnets
        ),
        fusion=None,
        programs=tuple(programs),
        checks=(),
        files=bundle.digest_files(directory),
        provenance=provenance,
    )
    bundle.write_manifest(directory, manifest)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
