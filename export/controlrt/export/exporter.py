"""From checkpoints to a directory of ONNX programs with a manifest, kept in the content-keyed cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    adapters: Mapping[str, str] = field(default_factory=dict)
    """T2I-Adapters; they share the names of the ControlNets, so each is called by one name."""
    profile: ShapeProfile

    def __post_init__(self) -> None:
        twice = sorted(set(self.controlnets) & set(self.adapters))
        if twice:
            raise ParameterError("control name", twice[0], "given to one ControlNet or one adapter, not to both")
        for name in (*self.controlnets, *self.adapters):
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
    adapters = {name: checkpoints.resolve(source, "adapter") for name, source in options.adapters.items()}
    resolved = {"model": model} | {f"controlnet.{name}": path for name, path in controlnets.items()}
    resolved |= {f"adapter.{name}": path for name, path in adapters.items()}
    sources = {name: _digest(checkpoints.digest_files(path)) for name, path in resolved.items()}
    versions = {tool: importlib.metadata.version(tool) for tool in TOOLS}
    inputs = {
        "sources": sources,
        "controls": [[name, annotator_named_in(name, source)] for name, source in _controls(options).items()],
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
            _export_into(partial, options, resolved, key, provenance)
    return Exported(path=target, cached=False)


def _export_into(
    directory: Path, options: ExportOptions, resolved: Mapping[str, Path], key: str, provenance: Provenance
) -> None:
    from controlrt.export.programs import (
        adapter_program,
        controlnet_program,
        text_encoder_program,
        unet_program,
        vae_programs,
    )
    from controlrt.export.trace import export_program

    with Progress("export", 3 + len(resolved)) as progress:
        progress.start("load checkpoint")
        loaded = checkpoints.load(
            resolved["model"],
            {name: resolved[f"controlnet.{name}"] for name in options.controlnets},
            {name: resolved[f"adapter.{name}"] for name in options.adapters},
        )
        factor = loaded.vae_scale_factor
        specs: list[ProgramSpec] = [
            *(text_encoder_program(parts) for parts in loaded.text_encoders),
            *(controlnet_program(loaded, name, controlnet) for name, controlnet in loaded.controlnets.items()),
            *(adapter_program(loaded, name, adapter) for name, adapter in loaded.adapters.items()),
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
    by_name = {program.name: program for program in programs}
    controls = _manifest_controls(options, loaded, by_name)
    for name, source in _controls(options).items():
        channels = next(control.channels for control in controls if control.name == name)
        hint = Hint(annotator=annotator_named_in(name, source), channels=channels)
        (directory / "hints" / f"{name}.json").write_bytes(msgspec.json.encode(hint) + b"\n")
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
        controls=controls,
        fusion=None,
        programs=tuple(programs),
        checks=(),
        files=bundle.digest_files(directory),
        provenance=provenance,
    )
    bundle.write_manifest(directory, manifest)


def _controls(options: ExportOptions) -> dict[str, str]:
    """Sources of ControlNets and adapters, by name."""
    return {**options.controlnets, **options.adapters}


def _manifest_controls(
    options: ExportOptions, loaded: checkpoints.Checkpoint, programs: Mapping[str, Program]
) -> tuple[Control, ...]:
    controlnets = [
        Control(
            name=name,
            kind="controlnet",
            part=f"controlnet.{name}",
            source=options.controlnets[name],
            layers=len(programs[f"controlnet.{name}"].outputs),
            channels=controlnet.config.conditioning_channels,
            global_pool=bool(controlnet.config.global_pool_conditions),
        )
        for name, controlnet in loaded.controlnets.items()
    ]
    adapters = [
        Control(
            name=name,
            kind="adapter",
            part=f"adapter.{name}",
            source=options.adapters[name],
            layers=len(programs[f"adapter.{name}"].outputs),
            channels=adapter.config.in_channels,
        )
        for name, adapter in loaded.adapters.items()
    ]
    return (*controlnets, *adapters)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
