"""From checkpoints to a directory of ONNX programs with a manifest, kept in the content-keyed cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from controlrt.export import checkpoint as checkpoints
from controlrt.export.checkpoint import IPAdapterSource, LoraSource
from controlrt.export.control_types import PROMAX, control_types
from controlrt.runtime import bundle
from controlrt.runtime.annotators import annotator_named_in
from controlrt.runtime.commands.lora_option import LoraOption
from controlrt.runtime.errors import BundleError, ParameterError
from controlrt.runtime.machine import available_memory, usable_cores
from controlrt.runtime.manifest import (
    SCHEMA_VERSION,
    Control,
    Hint,
    IPAdapter,
    Lora,
    Manifest,
    Model,
    Name,
    Program,
    Provenance,
    TextEncoder,
)
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import Progress
from controlrt.runtime.storage import atomic_directory, cache_root, lock, sha256_file, sha256_tree

if TYPE_CHECKING:
    from controlrt.export.programs import ProgramSpec
    from controlrt.export.traced import ProgramKeys

TOOLS = ("controlrt", "diffusers", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export. Sources are diffusers folders, single files or hub ids."""

    model: str
    controlnets: Mapping[str, str]
    adapters: Mapping[str, str] = field(default_factory=dict)
    """T2I-Adapters; they share the names of the ControlNets, so each is called by one name."""
    ip_adapters: Mapping[str, str] = field(default_factory=dict)
    image_encoder: str | None = None
    """Of the IP-Adapters; the folder ``image_encoder`` beside each where not given."""
    profile: ShapeProfile
    loras: tuple[LoraOption, ...] = ()
    """Merged into the model."""
    config: str | None = None
    """For a single file: the folder or hub id of a diffusers pipeline that says what the file leaves unsaid."""
    prediction_type: str | None = None
    """For a single file: what its UNet predicts, where neither it nor its kind tells."""

    def __post_init__(self) -> None:
        twice = sorted(set(self.controlnets) & set(self.adapters))
        if twice:
            raise ParameterError("control name", twice[0], "given to one ControlNet or one adapter, not to both")
        for name in (*self.controlnets, *self.adapters, *self.ip_adapters):
            try:
                msgspec.convert(name, Name)
            except msgspec.ValidationError:
                allowed = "letters, digits, '.', '_' and '-', starting with a letter or digit"
                kind = "IP-Adapter name" if name in self.ip_adapters else "control name"
                raise ParameterError(kind, name, allowed) from None
        if self.image_encoder is not None and not self.ip_adapters:
            raise ParameterError(
                "--image-encoder", self.image_encoder, "given with --ip-adapter, whose pictures it reads"
            )


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
    sources = resolve_sources(options)
    versions = {tool: importlib.metadata.version(tool) for tool in TOOLS}
    key = export_key(options, sources, versions)
    target = cache_root() / "exports" / key
    with lock(target):
        with contextlib.suppress(BundleError):  # absent or damaged: it is made anew
            bundle.Bundle.open(target)
            return Exported(path=target, cached=True)
        with atomic_directory(target) as partial:
            provenance = Provenance(
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                command=command,
                sources=sources.digests,
                versions=versions,
            )
            keys = _export_into(partial, options, sources, key, provenance)
        _note_traced(target, keys)
    return Exported(path=target, cached=False)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the sources of ``ExportOptions`` lie."""

    model: Path
    controlnets: Mapping[str, Path]
    adapters: Mapping[str, Path]
    ip_adapters: tuple[IPAdapterSource, ...]
    loras: tuple[LoraSource, ...]
    config: Path | None
    digests: dict[str, str]
    """Of their contents, by what each is."""


def resolve_sources(options: ExportOptions) -> Sources:
    """Finds and digests every source.

    Raises:
        SourceError: one that cannot be found.
    """
    model = checkpoints.resolve(options.model, "model")
    controlnets = {name: checkpoints.resolve(source, "ControlNet") for name, source in options.controlnets.items()}
    adapters = {name: checkpoints.resolve(source, "adapter") for name, source in options.adapters.items()}
    ip_adapters = tuple(
        checkpoints.resolve_ip_adapter(name, source, options.image_encoder)
        for name, source in options.ip_adapters.items()
    )
    config = None if options.config is None else checkpoints.resolve_config(options.config)
    loras = _resolve_loras(options.loras)
    digests = {"model": _digest(checkpoints.digest_files(model))}
    digests |= {f"controlnet.{name}": _digest(checkpoints.digest_files(path)) for name, path in controlnets.items()}
    digests |= {f"adapter.{name}": _digest(checkpoints.digest_files(path)) for name, path in adapters.items()}
    for ip_adapter in ip_adapters:
        digests[f"ip_adapter.{ip_adapter.name}"] = _digest(checkpoints.digest_files(ip_adapter.file))
        digests[f"image_encoder.{ip_adapter.name}"] = _digest(checkpoints.digest_files(ip_adapter.image_encoder))
    digests |= {f"lora.{lora.name}": _digest(checkpoints.digest_lora(lora.path)) for lora in loras}
    if config is not None:
        digests["config"] = _digest(checkpoints.digest_configs(config))
    return Sources(
        model=model,
        controlnets=controlnets,
        adapters=adapters,
        ip_adapters=ip_adapters,
        loras=loras,
        config=config,
        digests=digests,
    )


def export_key(options: ExportOptions, sources: Sources, versions: Mapping[str, str]) -> str:
    """Digest of everything that decides what an export holds."""
    return _digest(
        {
            "sources": sources.digests,
            "controls": [[name, annotator_named_in(name, source)] for name, source in _controls(options).items()],
            "ip_adapters": [ip_adapter.name for ip_adapter in sources.ip_adapters],
            "control_types": [annotator_named_in(name) for names in PROMAX for name in names],
            "loras": [[lora.name, lora.weight] for lora in sources.loras],
            "prediction_type": options.prediction_type,
            "profile": msgspec.to_builtins(options.profile),
            "tools": _tools(versions),
        }
    )


def _tools(versions: Mapping[str, str]) -> dict[str, str]:
    """What makes an export of sources."""
    exporter = sha256_tree(Path(__file__).parent, "*.py")
    return {**versions, "schema": str(SCHEMA_VERSION), "exporter": exporter}


def _resolve_loras(options: tuple[LoraOption, ...]) -> tuple[LoraSource, ...]:
    """LoRAs with names of their own: the file's, with a number where it comes again."""
    found: list[LoraSource] = []
    for option in options:
        path = checkpoints.resolve_lora(option.source)
        named = path.stem if path.stem not in checkpoints.UNTELLING_LORA_NAMES else Path(option.source).name
        taken = {lora.name for lora in found}
        numbered = (f"{named}-{number}" for number in itertools.count(2))
        name = next(each for each in itertools.chain([named], numbered) if each not in taken)
        found.append(LoraSource(name=name, path=path, weight=option.weight))
    return tuple(found)


def _note_traced(export: Path, keys: Mapping[str, ProgramKeys]) -> None:
    from controlrt.export.traced import note_traced

    manifest = bundle.read_manifest(export)
    for program in manifest.programs:
        note_traced(keys[program.name], program, export, manifest.files)


def _export_into(
    directory: Path, options: ExportOptions, sources: Sources, key: str, provenance: Provenance
) -> dict[str, ProgramKeys]:
    """Writes an export; returns the keys of its programs by their names."""
    from controlrt.export.beside import processes_for, trace_beside
    from controlrt.export.checkpoint_programs import CheckpointPrograms

    parts = len(sources.controlnets) + len(sources.adapters) + len(sources.ip_adapters)
    with Progress("export", 4 + parts) as progress:
        progress.start("load checkpoint")
        programs = CheckpointPrograms(options, sources, available_memory())
        loaded, specs = programs.checkpoint, programs.specs
        progress.total = 1 + len(specs)
        target = directory / "programs"
        target.mkdir()
        tools = _tools(provenance.versions)
        keys: dict[str, ProgramKeys] = {}
        by_name: dict[str, Program] = {}
        for part in programs.parts:
            of_part, taken = _take(programs.of_part(part), options.profile, tools, target, progress)
            keys |= of_part
            by_name |= taken
        new = [spec for spec in specs if spec.name not in by_name]
        processes = min(len(new), processes_for(specs, options.profile, usable_cores(), available_memory()))
        if processes > 1:
            by_name |= trace_beside(options, sources, new, target, processes, progress)
        else:
            names = {spec.name for spec in new}
            for part in dict.fromkeys(spec.part for spec in new):
                by_name |= _trace(programs.of_part(part), names, options.profile, target, progress)
    for parts in loaded.text_encoders:
        folder = directory / parts.name.replace("text_encoder", "tokenizer")
        folder.mkdir()
        parts.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (directory / "scheduler.json").write_text(json.dumps(loaded.scheduler_config, indent=2, default=str) + "\n")
    (directory / "hints").mkdir()
    controls = _manifest_controls(options, loaded, by_name)
    for control in controls:
        for name, annotator in _annotators(control).items():
            hint = Hint(annotator=annotator, channels=control.channels)
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
            vae_scale_factor=loaded.vae_scale_factor,
            time_ids=loaded.time_ids,
            zero_empty_negative=loaded.zero_empty_negative,
            vae_float32=loaded.vae_float32,
            loras=tuple(
                Lora(name=lora.name, source=option.source, weight=lora.weight, sha256=sha256_file(lora.path))
                for lora, option in zip(sources.loras, options.loras, strict=True)
            ),
        ),
        text_encoders=tuple(
            TextEncoder(
                program=parts.name,
                tokenizer=f"{parts.name.replace('text_encoder', 'tokenizer')}/tokenizer.json",
                max_length=parts.max_length,
                pad_token_id=parts.pad_token_id,
                bos_token_id=parts.bos_token_id,
                eos_token_id=parts.eos_token_id,
                vocab_size=parts.model.config.vocab_size,
                max_clip_skip=parts.max_clip_skip,
                pooled=parts.pooled,
            )
            for parts in loaded.text_encoders
        ),
        controls=controls,
        ip_adapters=tuple(
            IPAdapter(
                name=parts.name,
                program=parts.program,
                source=options.ip_adapters[parts.name],
                side=parts.side,
                tokens=parts.tokens,
                layers=parts.layers,
            )
            for parts in loaded.ip_adapters
        ),
        fusion=None,
        programs=tuple(by_name[spec.name] for spec in specs),
        checks=(),
        files=bundle.digest_files(directory),
        provenance=provenance,
    )
    bundle.write_manifest(directory, manifest)
    return keys


def _take(
    specs: Sequence[ProgramSpec], profile: ShapeProfile, tools: Mapping[str, str], target: Path, progress: Progress
) -> tuple[dict[str, ProgramKeys], dict[str, Program]]:
    """The keys of programs, and the manifest entries of those that were traced before, by their names."""
    from controlrt.export.traced import program_keys, take_graph, take_traced

    keys = {spec.name: program_keys(spec, profile.of(spec.name), tools) for spec in specs}
    found: dict[str, Program] = {}
    for spec in specs:
        if program := take_traced(keys[spec.name], target):
            progress.start(f"{spec.name} was traced before")
        elif program := take_graph(keys[spec.name], spec, profile.of(spec.name), target):
            progress.start(f"{spec.name} was traced before with other weights")
        else:
            continue
        found[spec.name] = program
    return keys, found


def _trace(
    specs: Sequence[ProgramSpec], names: Collection[str], profile: ShapeProfile, target: Path, progress: Progress
) -> dict[str, Program]:
    """The manifest entries of those of ``specs`` that have one of ``names``, once they are traced."""
    from controlrt.export.trace import export_program

    traced = {}
    for spec in (spec for spec in specs if spec.name in names):
        progress.start(f"trace {spec.name}")
        traced[spec.name] = export_program(spec, profile.of(spec.name), target)
    return traced


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
            control_types=control_types(controlnet.config.get("num_control_type", 0)),
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
    names = Counter(name for control in (*controlnets, *adapters) for name in control.names)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ParameterError("control name", twice[0], "another one than those of a ControlNet Union's types")
    return (*controlnets, *adapters)


def _annotators(control: Control) -> dict[str, str | None]:
    """What makes the pictures that each name of a control stands for, where its words tell."""
    if not control.control_types:
        return {control.name: annotator_named_in(control.name, control.source)}
    types = zip(control.names, control.control_types, strict=True)
    return {name: annotator_named_in(own_type) for name, own_type in types}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
