"""What to refit and with what, and which bundles cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from controlrt.engines.build import BuildOptions
from controlrt.engines.parts import QUANTIZED, fused_controls
from controlrt.engines.tensorrt.request import MODULES, Flavour
from controlrt.engines.tensorrt.structure import structure_file
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.commands.lora_option import LoraOption
from controlrt.runtime.errors import UnknownNameError, UserError
from controlrt.runtime.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class RefitOptions:
    """Which bundle to refit, and what of its sources to replace; the rest are those that it was built from."""

    bundle: Path
    output: Path
    model: str | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    ip_adapters: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[LoraOption, ...] | None = None
    """In place of the bundle's own; none at all where empty."""

    @property
    def replaces(self) -> bool:
        """Whether any source is named."""
        return bool(self.model or self.controlnets or self.adapters or self.ip_adapters or self.loras is not None)


def refittable_flavour(bundle: Bundle, options: RefitOptions) -> Flavour:
    """Which TensorRT the bundle is for; raises UserError unless it can be refitted with what is named."""
    manifest, again = bundle.manifest, "build it again with build-engines"
    flavour = next((each for each in MODULES if each == manifest.backend), None)
    if flavour is None:
        raise UserError(
            f"{bundle.path} is for {manifest.backend}, whose programs are ONNX and not engines; build another bundle "
            "with build-engines, which takes no longer"
        )
    engines = [program.engine for program in manifest.programs if program.engine is not None]
    if not all(engine.refittable for engine in engines):
        raise UserError(f"{bundle.path}: its engines keep their weights; {again} and --refittable")
    if manifest.precision in QUANTIZED:
        raise UserError(
            f"{bundle.path} is in {manifest.precision}: what its layers read was measured with its own weights, so it "
            "cannot be refitted; calibrate the other checkpoint and build a bundle of it with build-engines"
        )
    structures = [structure_file(program.file) for program in manifest.programs]
    if missing := [file for file in structures if file not in manifest.files]:
        raise UserError(f"{bundle.path} has no {missing[0]}, so nothing says what fits its engines; {again}")
    own = {
        kind: [control.name for control in manifest.controls if control.kind == kind]
        for kind in ("controlnet", "adapter")
    }
    for kind, named, known in (
        ("ControlNet", options.controlnets, own["controlnet"]),
        ("adapter", options.adapters, own["adapter"]),
        ("IP-Adapter", options.ip_adapters, [adapter.name for adapter in manifest.ip_adapters]),
    ):
        for name in named:
            if name not in known:
                raise UnknownNameError(kind, name, known, "refit replaces what a bundle has")
    if not options.replaces and not any(engine.stripped for engine in engines):
        raise UserError(
            f"{bundle.path} has its weights; say what to replace: --controlnet NAME=SOURCE, --lora FILE, --model SOURCE"
        )
    return flavour


def sources_of(options: RefitOptions, manifest: Manifest) -> BuildOptions:
    """What the bundle was built from and how, with other sources where some are named."""
    model = manifest.model
    loras = tuple(LoraOption(source=lora.source, weight=lora.weight) for lora in model.loras)
    controls = {
        kind: {control.name: control.source for control in manifest.controls if control.kind == kind}
        for kind in ("controlnet", "adapter")
    }
    ip_adapters = {adapter.name: adapter.source for adapter in manifest.ip_adapters}
    return BuildOptions(
        model=options.model or model.source,
        controlnets={**controls["controlnet"], **options.controlnets},
        adapters={**controls["adapter"], **options.adapters},
        ip_adapters={**ip_adapters, **options.ip_adapters},
        image_encoder=next((each.image_encoder for each in manifest.ip_adapters if each.image_encoder), None),
        profile=manifest.profile,
        output=options.output,
        backend=manifest.backend,
        precision=manifest.precision,
        fuse=fused_controls(manifest),
        loras=loras if options.loras is None else options.loras,
        config=model.config,
        prediction_type=model.prediction_type,
    )
