"""Builds engines, each in a process of its own, and keeps them in the cache by what decides what they are."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import msgspec

from controlrt.engines.tensorrt import child
from controlrt.engines.tensorrt.dialect import write_for_parser
from controlrt.engines.tensorrt.log import warnings_of
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.engines.tensorrt.process import REFUSED, Ended, refuse_full_disk, run_child
from controlrt.engines.tensorrt.profiles import optimization_profiles
from controlrt.engines.tensorrt.request import MODULES, BuildAnswer, BuildRequest, Flavour, Shapes
from controlrt.engines.tensorrt.structure import structure_file, write_structure
from controlrt.runtime.cuda.gpu import RTX_CAPABILITIES, Gpu, find_gpu
from controlrt.runtime.errors import BuildError, ParameterError, UserError
from controlrt.runtime.manifest import Engine, Program
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import note
from controlrt.runtime.storage import atomic_directory, cache_root, lock, sha256_file

CHILD = (sys.executable, "-m", child.__name__)
LONG_SECONDS = 5.0
"""A phase of the builder that takes longer is worth a line."""
PLAN, RECORD = "engine.plan", "engine.json"
_log = logging.getLogger(__name__)


def engine_cache() -> Path:
    """Where engines are kept, each in a directory called by its key."""
    return cache_root() / "engines"


class TensorRtBuilder:
    """See ``EngineBuilder``.

    Args:
        flavour: TensorRT, which builds for the GPU of this machine, or TensorRT-RTX, which needs none to build.
    """

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour

    def is_installed(self) -> bool:
        """Whether the builder and what drives it are."""
        return all(importlib.util.find_spec(name) is not None for name in (MODULES[self.flavour], "polygraphy"))

    def versions(self) -> dict[str, str]:
        """Of the builder and of what drives it; with TensorRT, the GPU too, which decides as much."""
        versions = {
            self.flavour: _version(MODULES[self.flavour]),
            "polygraphy": importlib.metadata.version("polygraphy"),
        }
        gpu = self._gpu()
        return versions if gpu is None else {**versions, "gpu": f"{gpu.name} ({gpu.compute_capability})"}

    def check(self, options: EngineOptions) -> None:
        """Refuses what the builder or this machine cannot do.

        Raises:
            UserError: such an option; the message says what to do instead.
        """
        gpu = find_gpu()
        if self.flavour == "tensorrt":
            self._check_gpu(options, gpu)
            return
        for capability in options.compute_capabilities:
            if capability not in RTX_CAPABILITIES:
                raise ParameterError("--compute-capability", capability, f"one of {', '.join(RTX_CAPABILITIES)}")
        if options.version_compatible:
            raise UserError(
                "--version-compatible needs TensorRT's lean runtime, which TensorRT-RTX has none of; drop it"
            )
        for asked, option in ((options.refittable, "--refittable"), (options.strip_weights, "--strip-weights")):
            if asked and gpu is None:
                raise UserError(
                    f"{option}: TensorRT-RTX builds such engines on a GPU only, and there is none here; drop it"
                )
            if asked and len(options.compute_capabilities) > 1:
                allowed = f"one at most with {option}, which TensorRT-RTX builds for no more"
                raise ParameterError("--compute-capability", ",".join(options.compute_capabilities), allowed)

    def build(
        self, program: Program, onnx: Path, target: Path, profile: ShapeProfile, options: EngineOptions
    ) -> Program:
        """Builds one program's engine, or copies it where the cache has it.

        Args:
            program: its manifest entry.
            onnx: its ONNX file, weights beside it.
            target: the bundle's directory; the engine becomes ``programs/NAME.plan``, and its structure lies beside it
                where it can be refitted.
            profile: what sizes it must run at.
            options: as ``check`` has let pass.

        Returns:
            The manifest entry of the engine.

        Raises:
            BuildError: the builder refuses the program, crashes or is killed.
            OutputError: no space left.
        """
        parsed, structure = write_for_parser(program.name, onnx)
        profiles = optimization_profiles(program, profile.of(program.part))
        kept = engine_cache() / self._key(structure.digest, profiles, options)
        with lock(kept):
            record = _read(kept)
            if record is None:
                with atomic_directory(kept) as partial:
                    record = self._run(program, parsed, partial, profiles, options)
                    (partial / RECORD).write_bytes(msgspec.json.encode(record))
            file = f"programs/{program.name}.plan"
            shutil.copyfile(kept / PLAN, target / file)
        parsed.unlink()
        if record.engine.refittable:
            write_structure(target / structure_file(file), structure)
        return msgspec.structs.replace(program, file=file, engine=record.engine)

    def _check_gpu(self, options: EngineOptions, gpu: Gpu | None) -> None:
        if gpu is None:
            raise UserError(
                "TensorRT builds engines for the GPU that it runs on, and there is none here; "
                "build on the machine that will run them, or with --backend tensorrt-rtx"
            )
        for capability in options.compute_capabilities:
            if capability != gpu.compute_capability:
                allowed = f"{gpu.compute_capability}, this machine's ({gpu.name}); tensorrt-rtx builds for others too"
                raise ParameterError("--compute-capability", capability, allowed)

    def _key(self, digest: str, profiles: object, options: EngineOptions) -> str:
        code = sha256_file(Path(child.__file__))
        decisive = [digest, profiles, asdict(options), self.versions(), code]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _run(
        self, program: Program, onnx: Path, directory: Path, profiles: list[Shapes], options: EngineOptions
    ) -> _Record:
        with tempfile.TemporaryDirectory(prefix="controlrt-engine-") as scratch:
            request = BuildRequest(
                flavour=self.flavour,
                onnx=str(onnx),
                plan=str(directory / PLAN),
                answer=f"{scratch}/answer.json",
                timing_cache=self._timing_cache(),
                profiles=profiles,
                options=options,
            )
            ended = run_child(CHILD, request, Path(scratch))
            if ended.code != 0 or not Path(request.answer).is_file():
                raise self._failure(program.name, ended)
            answer = msgspec.json.decode(Path(request.answer).read_bytes(), type=BuildAnswer)
        _compare(program, answer)
        for warning in warnings_of(ended.log):
            _log.warning("%s %s: %s", self.flavour, program.name, warning)
        for phase, seconds in sorted(answer.phases.items(), key=lambda each: -each[1]):
            if seconds >= LONG_SECONDS:
                note(f"{self.flavour} {program.name}: {phase} took {seconds:.0f} s")
        gpu = self._gpu()
        engine = Engine(
            builder=self.flavour,
            version=answer.version,
            compute_capabilities=(gpu.compute_capability,) if gpu else options.compute_capabilities,
            gpu=gpu.name if gpu else None,
            build_seconds=answer.seconds,
            optimization_profiles=len(profiles),
            refittable=options.refittable or options.strip_weights,
            stripped=options.strip_weights,
            version_compatible=options.version_compatible,
        )
        return _Record(engine=engine, sha256=sha256_file(directory / PLAN))

    def _timing_cache(self) -> str | None:
        """TensorRT times kernels on the GPU; what it measured holds for that GPU and version."""
        gpu = self._gpu()
        if gpu is None:
            return None
        directory = cache_root() / "timing"
        directory.mkdir(parents=True, exist_ok=True)
        return str(directory / f"tensorrt-{_version('tensorrt')}-{gpu.name.replace(' ', '-')}.cache")

    def _gpu(self) -> Gpu | None:
        """The one that the engine is for; None where it is for more than one."""
        return find_gpu() if self.flavour == "tensorrt" else None

    def _failure(self, name: str, ended: Ended) -> BuildError:
        refuse_full_disk(ended, f"building the engine of {name}")
        if ended.code == REFUSED:
            mend = "build with --backend onnxruntime, or --precision fp32 if types are the reason"
        elif ended.code == -signal.SIGKILL:
            mend = "was there enough memory? --workspace and smaller --profile ranges need less"
        elif ended.code < 0:
            mend = "build for one size (--profile 512x512 --batch 1), or with --backend onnxruntime"
        elif ended.code == 0:
            mend = "build with --backend onnxruntime"
        else:
            mend = f"if its log names no other reason, install it anew: pip install 'controlrt[{self.flavour}]'"
        return BuildError(
            f"program {name}: {self.flavour} {ended.how}; {mend}. The end of its log:\n{ended.end_of_log}"
        )


def _compare(program: Program, answer: BuildAnswer) -> None:
    """Raises BuildError unless the engine reads and writes what the manifest says, and on the GPU."""
    for tensor in (*answer.inputs, *answer.outputs):
        if tensor.on_host:
            raise BuildError(f"program {program.name}: {tensor.name} decides shapes, which no launch can wait for")
    for kind, expected, found in (
        ("reads", program.inputs, answer.inputs),
        ("writes", program.outputs, answer.outputs),
    ):
        wanted = {spec.name: (spec.dtype, len(spec.shape)) for spec in expected}
        seen = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in found}
        for name in sorted(wanted.keys() | seen.keys()):
            if wanted.get(name) != seen.get(name):
                raise BuildError(
                    f"program {program.name}: the engine {kind} {name} as {seen.get(name, 'nothing')} (type, rank), "
                    f"the manifest says {wanted.get(name, 'nothing')}"
                )


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the cache knows of an engine."""

    engine: Engine
    sha256: str


def _read(kept: Path) -> _Record | None:
    """What the cache holds at ``kept``, if it is whole."""
    try:
        record = msgspec.json.decode((kept / RECORD).read_bytes(), type=_Record)
        return record if sha256_file(kept / PLAN) == record.sha256 else None
    except (OSError, msgspec.DecodeError):
        return None


@functools.cache
def _version(module: str) -> str:
    """The version of the distribution that brings ``module``, which is not always called like it."""
    known = importlib.metadata.packages_distributions()
    names = known.get(module) or known.get(f"{module}_bindings") or []
    return importlib.metadata.version(names[0]) if names else "unknown"
