"""Builds a bundle: has the checkpoint exported, compiles every program for the backend, writes all of it or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec

import controlrt.compiler
import controlrt.engines
from controlrt.compiler.compile import FUSED, Passes, compile_program
from controlrt.compiler.quantization.statistics import Statistics
from controlrt.compiler.verify import Verifier
from controlrt.compiler.weights import WeightStore
from controlrt.engines.backends import BACKENDS, Backend
from controlrt.engines.exported_files import copy_files, exported_files
from controlrt.engines.parts import QUANTIZED, few_pictures, part_graphs, part_precision
from controlrt.engines.quality import measurable, measure_parts
from controlrt.engines.quantization.choice import choose, reduces_range, unquantized_precision
from controlrt.engines.quantization.layer_choice import fitting
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.engines.quantization.quality_gate import measure_quality, pass_gate
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.runtime.bundle import Bundle, digest_files, read_manifest, write_manifest
from controlrt.runtime.commands import INTERRUPTED
from controlrt.runtime.commands.lora_option import LoraOption
from controlrt.runtime.cuda.gpu import RTX_CAPABILITIES, Gpu, find_gpu
from controlrt.runtime.errors import (
    BundleError,
    ControlRTError,
    ParameterError,
    UnknownNameError,
    UserError,
)
from controlrt.runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Fusion,
    Manifest,
    PassCheck,
    Precision,
    Program,
    Provenance,
)
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import Progress
from controlrt.runtime.storage import (
    atomic_directory,
    check_writable,
    lock,
    refuse_foreign_directory,
    sha256_file,
    sha256_tree,
)

FP8_CAPABILITY = 8.9
"""The first compute capability of GPUs that have fp8."""
SIGNAL_SECONDS = 5
"""Until the export process is told once more to end."""
COMPILED = "compiled"
"""Where ONNX that is not shipped lies while engines are built of it."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to build and where. Sources are diffusers folders, single files or hub ids."""

    model: str
    controlnets: Mapping[str, str]
    adapters: Mapping[str, str] = field(default_factory=dict)
    ip_adapters: Mapping[str, str] = field(default_factory=dict)
    image_encoder: str | None = None
    """Of the IP-Adapters; the folder ``image_encoder`` beside each where not given."""
    profile: ShapeProfile
    output: Path
    backend: BackendName = "onnxruntime"
    precision: Precision = "fp32"
    fuse: tuple[str, ...] = ()
    """Controls to fuse with the UNet into one program, for the steps at which exactly these are on."""
    verify: bool = False
    """Run every compiler pass before and after on seeded inputs, and record the difference."""
    measure: bool = True
    """Record what programs in less than float32 give up; without, whoever builds compares pictures himself."""
    loras: tuple[LoraOption, ...] = ()
    """Merged into the model."""
    config: str | None = None
    """For a single file: the folder or hub id of a diffusers pipeline that says what the file leaves unsaid."""
    prediction_type: str | None = None
    """For a single file: what its UNet predicts, where neither it nor its kind tells."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """For the backends that build engines."""
    quantization: QuantizationOptions | None = None
    """With the precisions "int8" and "fp8"."""
    for_calibration: bool = False
    """Leave out the passes that are for float32 alone: some hide layers from ``controlrt calibrate``."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UnknownNameError("backend", self.backend, BACKENDS)
        allowed = BACKENDS[self.backend].precisions
        if self.precision not in allowed:
            others = ", ".join(name for name, each in BACKENDS.items() if self.precision in each.precisions)
            known = f"one of {', '.join(allowed)} with {self.backend}; {self.precision} is for {others}"
            raise ParameterError("--precision", self.precision, known)
        if self.precision in QUANTIZED:
            self._check_quantization()
        if self.quantization is not None and self.quantization.precision != self.precision:
            statistics = str(self.quantization.statistics)
            raise ParameterError("--calibration", statistics, "left out without --precision int8 or fp8")
        for name in self.fuse:
            if name not in self.controlnets:
                raise UnknownNameError("control in --fuse", name, self.controlnets)

    def _check_quantization(self) -> None:
        if self.quantization is None:
            raise UserError(
                f"--precision {self.precision} needs to know what its layers read; name that with --calibration FILE, "
                "and make the file with: controlrt calibrate"
            )
        if self.engine.refittable or self.engine.strip_weights:
            raise UserError(
                f"--refittable and --strip-weights: nothing refits engines in {self.precision}, whose scales belong to "
                "their weights; drop them"
            )
        old = [each for each in self.engine.compute_capabilities if float(each) < FP8_CAPABILITY]
        if old and self.precision == "fp8":
            allowed = f"{FP8_CAPABILITY} or later with --precision fp8, which GPUs before have no numbers of"
            raise ParameterError("--compute-capability", ",".join(old), allowed)
        possible = BACKENDS[self.backend].unquantized_precisions()
        if self.quantization.unquantized not in (None, *possible):
            allowed = " or ".join(possible)
            if len(possible) == 1:
                allowed = f"left out with {self.backend}, which computes all else in {allowed}"
            raise ParameterError("--unquantized", self.quantization.unquantized, allowed)
        if self.quantization.budget is not None and BACKENDS[self.backend].device != "cpu":
            allowed = f"left out with {self.backend}: blocks are timed on CPUs only so far; choose layers with --keep"
            raise ParameterError("--quality-budget", self.quantization.budget, allowed)

    @property
    def engine_options(self) -> EngineOptions:
        """Of engines, ``engine``; in fp8, where no GPUs are named, for those that have it."""
        if self.precision == "fp8" and self.backend == "tensorrt-rtx" and not self.engine.compute_capabilities:
            able = tuple(each for each in RTX_CAPABILITIES if float(each) >= FP8_CAPABILITY)
            return replace(self.engine, compute_capabilities=able)
        return self.engine

    @property
    def unquantized_precision(self) -> Precision:
        """What all is computed in, layers in 8 bits excepted."""
        if self.quantization is None:
            return self.precision
        return unquantized_precision(self.quantization, BACKENDS[self.backend])

    @property
    def passes(self) -> Passes:
        """The compiler passes of the build, in order."""
        passes = BACKENDS[self.backend].passes
        return tuple(each for each in passes if not (self.for_calibration and getattr(each, "float32_only", False)))


class ExportFailedError(ControlRTError):
    """The export process failed; it has said why on stderr already."""

    reported = True

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("nothing was built, because the export failed (see above)")


@dataclass(frozen=True, kw_only=True)
class Built:
    """The bundle, and whether it was there already."""

    bundle: Bundle
    cached: bool


def build(options: BuildOptions, command: str) -> Built:
    """Builds the bundle, unless ``options.output`` holds the same one, whole.

    Raises:
        OutputError, UserError: the output cannot be written or holds something else, or the backend cannot do what is
            asked.
        ExportFailedError: the export process failed.
        BuildError: a program that the backend refuses.
    """
    refuse_foreign_directory(options.output, MANIFEST_NAME)
    check_writable(options.output)
    backend = BACKENDS[options.backend]
    backend.check_options(options.engine)
    refuse_fp8_without_gpu_for_it(options, find_gpu())
    statistics = Statistics.load(options.quantization.statistics) if options.quantization is not None else None
    with lock(options.output):
        source = export_sources(options)
        exported = read_manifest(source)
        _refuse_fused_union(options, exported)
        if statistics is not None:
            statistics = fitting(statistics, exported, options.profile)
        folders = [*controlrt.compiler.__path__, *controlrt.engines.__path__]
        code = [sha256_tree(Path(folder), "*.py") for folder in folders]
        passes = [type(each).__name__ for each in options.passes]
        decisive = [
            *(exported.key, options.backend, options.precision, options.fuse, options.verify, options.measure),
            *(asdict(options.engine_options), backend.versions(), code, passes, SCHEMA_VERSION),
        ]
        if options.quantization is not None:
            decisive += [sha256_file(options.quantization.statistics), asdict(options.quantization)]
            decisive += [reduces_range(options.quantization, backend), options.unquantized_precision]
        key = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()
        found = whole_bundle(options.output, key)
        if found is not None:
            return Built(bundle=found, cached=True)
        with atomic_directory(options.output) as partial:
            manifest = _compile(options, backend, source, exported, key, command, partial, statistics)
            write_manifest(partial, manifest)
    return Built(bundle=Bundle(options.output, manifest), cached=False)


def refuse_fp8_without_gpu_for_it(options: BuildOptions, gpu: Gpu | None) -> None:
    """TensorRT builds for the GPU of this machine, which may have no fp8.

    Raises:
        UserError: it has none.
    """
    if options.precision != "fp8" or options.backend != "tensorrt" or gpu is None:
        return
    if float(gpu.compute_capability) < FP8_CAPABILITY:
        raise UserError(
            f"--precision fp8: {gpu.name} has compute capability {gpu.compute_capability}, and fp8 comes with "
            f"{FP8_CAPABILITY}; build with --precision int8"
        )


def _refuse_fused_union(options: BuildOptions, exported: Manifest) -> None:
    for control in exported.controls:
        if control.control_types and control.name in options.fuse:
            allowed = "a ControlNet of one type: how many pictures a ControlNet Union is given, a call decides"
            raise ParameterError("--fuse", control.name, allowed)


def _compile(
    options: BuildOptions,
    backend: Backend,
    source: Path,
    exported: Manifest,
    key: str,
    command: str,
    target: Path,
    statistics: Statistics | None,
) -> Manifest:
    programs: list[Program] = []
    checks: list[PassCheck] = []
    choice = None
    if options.quantization is not None and statistics is not None:
        graphs = [each for each in part_graphs(source, exported, options.fuse) if each.program.name != FUSED]
        fused = {control.name: control.part for control in exported.controls if control.name in options.fuse}
        choice = choose(statistics, options.quantization, options.backend, exported, source, graphs, fused)
    (target / "programs").mkdir()
    compiled_to = target if backend.ships_onnx else target / COMPILED
    (compiled_to / "programs").mkdir(parents=True, exist_ok=True)
    measured = options.verify or (options.measure and options.precision != "fp32")
    parts = len(exported.programs) + bool(options.fuse)
    with Progress("build", parts * (2 + measured) + 1 + (choice is not None)) as progress:
        with WeightStore(compiled_to / "programs") as weights:
            for each in part_graphs(source, exported, options.fuse):
                name = each.program.name
                progress.start(f"compile {name}")
                precision = part_precision(name, options.unquantized_precision, exported)
                with _verifier(options, exported, name) if options.verify else contextlib.nullcontext() as verifier:
                    for compiled in compile_program(
                        each.program,
                        each.model,
                        exported.profile,
                        options.passes,
                        verifier,
                        precision,
                        quantize=choice.quantize(name) if choice is not None else None,
                        half_weights=choice is not None and precision != "fp16",
                        split=backend.device == "cuda",
                        guided=exported.time_cond_proj_dim is None,
                    ):
                        weights.save(compiled.model, Path(compiled.program.file).name)
                        programs.append(compiled.program)
                    if verifier is not None:
                        checks += verifier.checks
        copy_files(exported, source, target)
        manifest = msgspec.structs.replace(
            with_sources(exported, options),
            key=key,
            backend=options.backend,
            precision=options.precision,
            fusion=Fusion(part=FUSED, controls=options.fuse) if options.fuse else None,
            programs=tuple(programs),
            checks=tuple(checks),
            files=dict.fromkeys(
                (*exported_files(exported), *(program.file for program in programs)), ""
            ),  # digested last
            provenance=provenance(exported, backend, command),
        )
        if measured:
            every_part = part_graphs(source, exported, options.fuse)
            measured_programs = measure_parts(Bundle(compiled_to, manifest), every_part, exported, progress)
            manifest = msgspec.structs.replace(manifest, programs=measured_programs)
        if choice is not None:
            progress.start(f"draw in {options.precision}")
            if compiled_to != target:
                copy_files(exported, source, compiled_to)
            with measurable(Bundle(compiled_to, manifest)) as on_this_machine:
                quality = measure_quality(on_this_machine, choice.cases)
            pass_gate(quality, choice.options)
            manifest = msgspec.structs.replace(manifest, quantization=choice.record(quality))
        finished = []
        for part in dict.fromkeys(program.part for program in manifest.programs):
            progress.start(f"{options.backend} {part}")
            for program in (each for each in manifest.programs if each.part == part):
                onnx = compiled_to / program.file
                finished.append(backend.finish(program, onnx, target, options.profile, options.engine_options))
        if not backend.ships_onnx:
            shutil.rmtree(compiled_to)
        progress.start("hash files")
        return msgspec.structs.replace(manifest, programs=tuple(finished), files=digest_files(target))


def with_sources(exported: Manifest, options: BuildOptions) -> Manifest:
    """The manifest with sources as the build names them; a cached export may have come by other names."""
    controls = {**options.controlnets, **options.adapters}
    return msgspec.structs.replace(
        exported,
        model=msgspec.structs.replace(
            exported.model,
            source=options.model,
            config=options.config,
            prediction_type=options.prediction_type,
            loras=tuple(
                msgspec.structs.replace(lora, source=option.source)
                for lora, option in zip(exported.model.loras, options.loras, strict=True)
            ),
        ),
        controls=tuple(
            msgspec.structs.replace(control, source=controls[control.name]) for control in exported.controls
        ),
        ip_adapters=tuple(
            msgspec.structs.replace(
                adapter, source=options.ip_adapters[adapter.name], image_encoder=options.image_encoder
            )
            for adapter in exported.ip_adapters
        ),
    )


def provenance(exported: Manifest, backend: Backend, command: str) -> Provenance:
    """Of a bundle that is made now of an export."""
    return msgspec.structs.replace(
        exported.provenance,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=command,
        versions={**exported.provenance.versions, **backend.versions()},
    )


def _verifier(options: BuildOptions, exported: Manifest, part: str) -> Verifier:
    """A failing pass is kept beside the bundle."""
    return Verifier(few_pictures(exported, part), options.output.parent / f"{options.output.name}-verify")


def export_sources(options: BuildOptions) -> Path:
    """The traced ONNX programs of what is to be built; see ``export_programs``."""
    return export_programs(
        options.model,
        options.controlnets,
        options.profile,
        adapters=options.adapters,
        ip_adapters=options.ip_adapters,
        image_encoder=options.image_encoder,
        loras=options.loras,
        config=options.config,
        prediction_type=options.prediction_type,
    )


def export_programs(
    model: str,
    controlnets: Mapping[str, str],
    profile: ShapeProfile,
    *,
    adapters: Mapping[str, str] | None = None,
    ip_adapters: Mapping[str, str] | None = None,
    image_encoder: str | None = None,
    loras: Sequence[LoraOption] = (),
    config: str | None = None,
    prediction_type: str | None = None,
) -> Path:
    """The directory of the traced ONNX programs, which the cache keeps.

    Runs ``controlrt export`` in a process of its own, so that PyTorch is gone before engines build.

    Raises:
        ExportFailedError: it failed, and has said why.
        ControlRTError: it was killed.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "export.json"
        arguments = ["--profile", str(profile), "--batch", str(profile.batch), "--model", model]
        arguments += ["--prompt-chunks", str(profile.prompt_chunks)]
        if profile.vae_tile is not None:
            arguments += ["--vae-tile", str(profile.vae_tile)]
        for name, controlnet in controlnets.items():
            arguments += ["--controlnet", f"{name}={controlnet}"]
        for name, adapter in (adapters or {}).items():
            arguments += ["--adapter", f"{name}={adapter}"]
        for name, adapter in (ip_adapters or {}).items():
            arguments += ["--ip-adapter", f"{name}={adapter}"]
        for lora in loras:
            arguments += ["--lora", str(lora)]
        single = (("--image-encoder", image_encoder), ("--config", config), ("--prediction-type", prediction_type))
        for option, value in single:
            if value is not None:
                arguments += [option, value]
        command = [sys.executable, "-m", "controlrt.runtime.commands", "export", *arguments, "--report", str(report)]
        process = subprocess.Popen(command)
        try:
            exit_code = process.wait()
        except KeyboardInterrupt:
            while process.poll() is None:  # Python drops a signal that comes in a finalizer
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SIGNAL_SECONDS)
            raise
        if exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        if exit_code != 0:
            if exit_code < 0:
                raise ControlRTError(f"the export process was killed by signal {-exit_code}; was there enough memory?")
            raise ExportFailedError(exit_code)
        return Path(json.loads(report.read_text())["path"])


def whole_bundle(path: Path, key: str) -> Bundle | None:
    """The bundle at ``path`` if it has this key and every file is as built."""
    if not (path / MANIFEST_NAME).is_file():
        return None
    try:
        bundle = Bundle.open(path)
    except BundleError:
        return None
    return bundle if bundle.manifest.key == key else None
