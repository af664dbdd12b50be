"""What contenders need before they can start: exports and bundles, built once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import controlrt.calibration
from controlrt.calibration.cases import CollectOptions
from controlrt.calibration.collect import collect
from controlrt.calibration.data import DEMO
from controlrt.compiler.compile import load_program, one_picture
from controlrt.compiler.flops import count_flops
from controlrt.engines.build import BuildOptions, build, export_programs
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.perf.models import BenchModel, bench_directory
from controlrt.perf.peers.contenders import Peer
from controlrt.perf.peers.half_export import in_half
from controlrt.perf.peers.noise_levels import require_sampler
from controlrt.perf.peers.published_layout import PublishedCheckpoint
from controlrt.perf.peers.specs import BundleSpec, EagerSpec, PeerSpec, PlainSpec, StableDiffusionCppSpec
from controlrt.perf.scenarios import Task
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.inspection.workload import PROMPTS, ControlWindow, plan_picture
from controlrt.runtime.manifest import Precision
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.storage import atomic_file, sha256_tree

CALIBRATION_CASES, CALIBRATION_STEPS = 6, 5
"""Of a bundle in int8 or fp8."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A contender ready to start."""

    spec: PeerSpec
    engine_bytes: int | None
    build_seconds: float | None
    flops: int | None
    """Of one picture of the task's first call; None where no graph tells."""
    unquantized: Precision | None = None
    """Of a bundle with layers in 8 bits: what all else in its steps is computed in."""


class Workshop:
    """Prepares contenders of one model.

    Args:
        model: the checkpoint.
        batch: pictures per call that everything is built for, ``1`` or ``1-8``.
        threads: CPU threads of each contender.
        profile: what everything is built for; where None, the size of each task by itself.
    """

    def __init__(self, model: BenchModel, *, batch: str, threads: int, profile: ShapeProfile | None = None) -> None:
        self._model, self._threads = model, threads
        self._batch, self._profile = batch, profile
        self._exports: dict[str, Bundle | ControlRTError] = {}
        self._export_flops: dict[Path, dict[str, int]] = {}

    def prepare(self, peer: Peer, task: Task) -> Prepared:
        """Builds what is missing.

        Raises:
            ControlRTError: it cannot be built.
        """
        if peer.kind == "eager":
            return self._eager(peer, task)
        if peer.kind == "stable-diffusion.cpp":
            return self._stable_diffusion_cpp(peer, task)
        return self._plain(peer, task) if peer.kind == "plain" else self._bundle(peer, task)

    def eager_spec(self, peer: Peer, task: Task) -> EagerSpec:
        """How PyTorch runs the model; nothing needs to be built for it."""
        return EagerSpec(
            model=self._model.source,
            controlnets={name: self._model.controls[name] for name in task.controls},
            xl=self._is_xl(task),
            precision=peer.precision,
            device=peer.device,
            threads=self._threads,
            channels_last=peer.channels_last,
            compile_mode=peer.compile_mode,
        )

    def profile(self, task: Task) -> ShapeProfile:
        """What is built for a task."""
        return self._profile or ShapeProfile.parse(task.size, self._batch)

    def _eager(self, peer: Peer, task: Task) -> Prepared:
        files = self._model.files(task.controls)
        return Prepared(
            spec=self.eager_spec(peer, task),
            engine_bytes=sum(file.stat().st_size for file in files) or None,
            build_seconds=None,
            flops=self._eager_flops(task),
        )

    def _eager_flops(self, task: Task) -> int | None:
        """Those of the plain export; a model that cannot be exported still runs."""
        try:
            return self._plain_flops(self._export(task), task)
        except ControlRTError:
            return None

    def _stable_diffusion_cpp(self, peer: Peer, task: Task) -> Prepared:
        """Weights by the names that it knows; it brings them to its precision whenever it loads them."""
        require_sampler(task.sampler)
        if len(task.controls) != 1:
            raise ControlRTError(f"stable-diffusion.cpp runs one ControlNet, not {len(task.controls)}")
        checkpoint = PublishedCheckpoint(
            Path(self._model.source), Path(self._model.controls[task.controls[0]]), bench_directory()
        )
        spec = StableDiffusionCppSpec(
            model=str(checkpoint.model),
            controlnet=str(checkpoint.controlnet),
            precision=peer.precision,
            threads=self._threads,
        )
        return Prepared(spec=spec, engine_bytes=None, build_seconds=None, flops=self._eager_flops(task))

    def _plain(self, peer: Peer, task: Task) -> Prepared:
        exported = self._export(task)
        plain = in_half(exported) if peer.precision == "fp16" else exported
        return Prepared(
            spec=PlainSpec(export=str(plain.path), backend=peer.backend, threads=self._threads, device=peer.device),
            engine_bytes=_program_bytes(plain),
            build_seconds=_export_seconds(exported),
            flops=self._plain_flops(exported, task),
        )

    def _bundle(self, peer: Peer, task: Task) -> Prepared:
        if peer.bundle is not None:
            bundle, seconds = Bundle.open(peer.bundle, verify=False), None
        else:
            bundle, seconds = self._build(peer, task)
        return Prepared(
            spec=BundleSpec(path=str(bundle.path), threads=self._threads),
            engine_bytes=_program_bytes(bundle),
            build_seconds=seconds,
            flops=_bundle_flops(bundle, task),
            unquantized=next((each.unquantized for each in bundle.manifest.programs if each.unquantized), None),
        )

    def _build(self, peer: Peer, task: Task) -> tuple[Bundle, float | None]:
        """The bundle, and the seconds of export and compilation when they were done."""
        if peer.backend is None:
            raise ValueError(f"contender {peer.name} has no backend")
        exported, profile = self._export(task), self.profile(task)
        kept = hashlib.sha256(f"{self._model.source}{self._model.controls}{profile}{profile.batch}".encode())
        output = bench_directory() / "bundles" / f"{self._model.name}-{kept.hexdigest()[:12]}" / peer.name
        options = BuildOptions(
            model=self._model.source,
            controlnets=self._model.controls,
            profile=profile,
            output=output,
            backend=peer.backend,
            precision=peer.precision,
            measure=False,
            quantization=self._quantization(task, peer.precision),
        )
        note = output.with_name(f"{peer.name}.seconds")
        started = time.monotonic()
        built = build(options, "controlrt bench")
        if not built.cached:
            with atomic_file(note) as partial:
                partial.write_text(f"{time.monotonic() - started:.2f}\n")
        compiled = float(note.read_text()) if note.is_file() else None
        return built.bundle, None if compiled is None else compiled + _export_seconds(exported)

    def _quantization(self, task: Task, precision: Precision) -> QuantizationOptions | None:
        """How a bundle in int8 or fp8 is built: by scenes of the demo model's kind, whatever the model.

        What it gives up stands beside its speed, so no likeness is asked for.
        """
        if precision != "int8" and precision != "fp8":
            return None
        profile = self.profile(task)
        kept = hashlib.sha256(f"{self._model.source}{self._model.controls}{profile}{profile.batch}".encode())
        directory = bench_directory() / "calibration" / f"{self._model.name}-{kept.hexdigest()[:12]}"
        options = BuildOptions(
            model=self._model.source,
            controlnets=self._model.controls,
            profile=profile,
            output=directory / "bundle",
            for_calibration=True,
        )
        bundle = build(options, "controlrt bench").bundle
        seen = CollectOptions(cases=CALIBRATION_CASES, steps=CALIBRATION_STEPS, unseen=1, size=profile.default_size)
        code = [sha256_tree(Path(folder), "*.py") for folder in controlrt.calibration.__path__]
        decisive = hashlib.sha256(repr([bundle.manifest.key, seen, code]).encode()).hexdigest()
        statistics = directory / f"statistics-{decisive[:12]}.safetensors"
        if not statistics.is_file():
            collect(bundle, DEMO, seen, statistics)
        return QuantizationOptions(precision=precision, statistics=statistics, min_psnr_db=0.0)

    def _export(self, task: Task) -> Bundle:
        """The export for a task. One that failed is not tried again."""
        key = str(self.profile(task))
        if key not in self._exports:
            try:
                path = export_programs(self._model.source, self._model.controls, self.profile(task))
                self._exports[key] = Bundle.open(path, verify=False)
            except ControlRTError as error:
                self._exports[key] = error
        found = self._exports[key]
        if isinstance(found, ControlRTError):
            raise found
        return found

    def _is_xl(self, task: Task) -> bool:
        index = Path(self._model.source) / "model_index.json"
        if index.is_file():
            return "XL" in json.loads(index.read_text())["_class_name"]
        return self._export(task).manifest.model.time_ids

    def _plain_flops(self, exported: Bundle, task: Task) -> int | None:
        """Of the graphs as exported, which is what eager PyTorch computes too."""
        manifest = exported.manifest
        if (task.width, task.height) != manifest.profile.default_size:
            return None
        if exported.path not in self._export_flops:
            dims = one_picture(manifest.profile)
            if manifest.time_cond_proj_dim is not None:
                dims["rows"] = 1
            self._export_flops[exported.path] = {
                program.name: count_flops(load_program(program, exported.path, manifest.profile).graph, dims).total
                for program in manifest.programs
                if program.name != "vae_encoder"
            }
        flops = self._export_flops[exported.path]
        parts = [control.part for control in manifest.controls if control.name in task.controls]
        in_loop = task.steps[0] * sum(flops[part] for part in (*parts, "unet"))
        return in_loop + PROMPTS * sum(flops[each.program] for each in manifest.text_encoders) + flops["vae_decoder"]


def _bundle_flops(bundle: Bundle, task: Task) -> int | None:
    if (task.width, task.height) != bundle.manifest.profile.default_size:
        return None
    workload = plan_picture(bundle, task.steps[0], {name: ControlWindow() for name in task.controls})
    return sum(use.flops for use in workload.uses)


def _program_bytes(bundle: Bundle) -> int:
    return sum(bundle.file(name).stat().st_size for name in bundle.manifest.files if name.startswith("programs/"))


def _export_seconds(exported: Bundle) -> float:
    return sum(program.export_seconds for program in exported.manifest.programs)
