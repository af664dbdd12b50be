"""Runs the cases of a calibration and gathers what the layers of UNet and ControlNets read."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import controlrt.calibration
from controlrt.calibration.cases import CollectOptions, PlannedCase, plan_cases
from controlrt.calibration.data import read_examples
from controlrt.calibration.gathered import Gathered
from controlrt.calibration.tapped import TappedExecutor
from controlrt.compiler.quantization.statistics import About, Case, Statistics, weights_of
from controlrt.engines.quantization.replay import replay
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import OutputError, UserError
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.progress import Progress
from controlrt.runtime.storage import check_writable, lock, sha256_tree

Hints = dict[str, NDArray[np.uint8]]


def collect(bundle: Bundle, data: str, options: CollectOptions, output: Path) -> Statistics:
    """Statistics of every layer, and the cases that they are not of; written to ``output``.

    After every case its state is written beside ``output``, so that the same call goes on where another was ended; what
    comes out is the same to the last byte.

    Args:
        bundle: in float32, for ONNX Runtime, built for calibration.
        data: names a calibration set; see ``read_examples``.
        options: how much is seen.
        output: a file of ``Statistics``.

    Raises:
        UserError: a set or options that cannot be.
        OutputError: a place that cannot be written.
        CalibrationError: a layer whose input is not finite.
    """
    check_output(output)
    manifest = bundle.manifest
    names = [name for control in manifest.controls for name in control.names]
    annotators = {name: bundle.hint(name).annotator for name in names}
    examples = read_examples(data, annotators, count=options.cases + options.unseen, seed=options.seed)
    cases = plan_cases(options, examples, names)
    about = About(
        parts=weights_of(manifest),
        data=data,
        cases=options.cases,
        steps=options.steps,
        samplers=options.samplers,
        guidance_scales=options.guidance_scales,
        size=options.size,
        seed=options.seed,
        versions=dict(manifest.provenance.versions),
        key=_key(manifest, options, cases),
    )
    with lock(output), ControlNetPipeline(bundle, executor=(executor := TappedExecutor(bundle))) as pipeline:
        if pipeline.sees_mask:
            raise UserError(
                "the model was made for inpainting, which cannot be calibrated yet; build it in fp32 or fp16"
            )
        return _Collection(pipeline, executor, options, about, output).run(cases)


def check_output(output: Path) -> None:
    """Makes the folder of ``output``, and sees that a file can be written there.

    Raises:
        OutputError: it cannot.
    """
    if output.is_dir():
        raise OutputError(f"{output} is a directory; name a file")
    check_writable(output)
    output.parent.mkdir(parents=True, exist_ok=True)


def partial_file(output: Path) -> Path:
    """Where the state of an unfinished calibration lies."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.partial.safetensors")


class _Collection:
    def __init__(
        self,
        pipeline: ControlNetPipeline,
        executor: TappedExecutor,
        options: CollectOptions,
        about: About,
        output: Path,
    ) -> None:
        self.pipeline, self.executor, self.options, self.about = pipeline, executor, options, about
        self.output = output
        self.gathered: dict[str, dict[str, Gathered]] = {}
        self.unseen: list[Case] = []

    def run(self, cases: Sequence[PlannedCase]) -> Statistics:
        done = self._resume()
        with Progress("calibrate", len(cases) - done) as progress:
            for case in cases[done:]:
                seen = case.number < self.options.cases
                progress.start(f"{case}" if seen else f"{case} (kept for comparison)")
                if seen:
                    self._see(case)
                else:
                    self.unseen.append(self._compare(case))
                self._statistics(case.number + 1).save(partial_file(self.output))
        statistics = self._statistics(len(cases))
        statistics.save(self.output)
        partial_file(self.output).unlink(missing_ok=True)
        return statistics

    def _resume(self) -> int:
        """Takes up the state of an unfinished run of the same key; returns how many of its cases are done."""
        file = partial_file(self.output)
        if not file.is_file():
            return 0
        try:
            found = Statistics.load(file)
        except UserError:
            found = None
        if found is None or found.about.key != self.about.key:
            print(f"{file} is of other options, programs or pictures; starting anew", file=sys.stderr, flush=True)
            return 0
        for part, layers in found.layers.items():
            self.gathered[part] = {name: Gathered.restored(layer) for name, layer in layers.items()}
        self.unseen = list(found.unseen)
        done = found.about.cases + len(found.unseen)
        print(f"going on after case {done}, from {file}", file=sys.stderr, flush=True)
        return done

    def _see(self, case: PlannedCase) -> None:
        """Folds what the taps give after every step."""

        def fold(_: object, __: int, timestep: float, ___: object) -> None:
            for reading in self.executor.readings():
                layers = self.gathered.setdefault(reading.part, {})
                for name in reading.layers:
                    if name not in layers:
                        layers[name] = Gathered.of(len(reading.amax))
                    layers[name].add(f"{name} of {reading.part}", timestep, reading.amax, reading.sample)

        self.executor.seed(self.options.seed, case.number)
        self.pipeline(
            **self._arguments(case),
            image=_hints(case, self.options) or None,
            callback_on_step_end=fold,
            output_type="latent",
        )

    def _compare(self, case: PlannedCase) -> Case:
        arguments, hints = self._arguments(case), _hints(case, self.options)
        latents, pictures = replay(self.pipeline, arguments, hints)
        return Case(arguments=arguments, hints=hints, latents=latents, pictures=pictures, scene=case.example.scene)

    def _arguments(self, case: PlannedCase) -> dict[str, Any]:
        return _arguments(case, self.options, self.pipeline.bundle.manifest.profile)

    def _statistics(self, done: int) -> Statistics:
        """Of the first ``done`` cases."""
        return Statistics(
            about=msgspec.structs.replace(self.about, cases=min(done, self.options.cases)),
            layers={
                part: {name: layer.statistics() for name, layer in layers.items()}
                for part, layers in self.gathered.items()
            },
            unseen=tuple(self.unseen),
        )


def _arguments(case: PlannedCase, options: CollectOptions, profile: ShapeProfile) -> dict[str, Any]:
    """Of the call, but for its pictures."""
    width, height = options.size
    arguments: dict[str, Any] = {
        "prompt": case.example.prompt,
        "width": width,
        "height": height,
        "num_inference_steps": options.steps,
        "guidance_scale": case.guidance_scale,
        "scheduler": case.sampler,
        "seed": case.seed,
    }
    if case.example.negative_prompt is not None:
        arguments["negative_prompt"] = case.example.negative_prompt
    if profile.batch.low > 1:
        arguments["num_images_per_prompt"] = profile.batch.low
    if profile.vae_tile is not None and max(options.size) > profile.vae_tile:
        arguments["vae_tiling"] = True
    return arguments


def _hints(case: PlannedCase, options: CollectOptions) -> Hints:
    """The control pictures of a case.

    Raises:
        PictureError: one that cannot be read.
    """
    return {name: case.example.controls[name](*options.size) for name in case.controls}


def _key(manifest: Manifest, options: CollectOptions, cases: Sequence[PlannedCase]) -> str:
    """SHA-256 of what decides the statistics. Reads every control picture, so one that cannot be read is told of before
    anything runs."""
    code = [sha256_tree(Path(folder), "*.py") for folder in controlrt.calibration.__path__]
    decisive: list[Any] = [manifest.key, code, asdict(options)]
    for case in cases:
        pictures = {name: hashlib.sha256(hint.tobytes()).hexdigest() for name, hint in _hints(case, options).items()}
        decisive.append([_arguments(case, options, manifest.profile), pictures])
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
