"""What single passes of backend cuda, and the second stream, are worth on a GPU.

    python perf/cuda_passes.py --model sd15 --output perf/results/cuda-passes-sd15.json

Builds the model's bundle as it is and once without each of the passes, loads all of them in one process and has them
draw the same pictures in turns, forwards and backwards. A step's time is the GPU's own, the median over a picture.
``one stream`` is the same bundle with ControlNets on the UNet's stream, ``unet in one`` the UNet as one program.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np

from controlrt.compiler import compile as compiler
from controlrt.engines.backends.cuda import CudaBackend
from controlrt.engines.build import BuildOptions, build
from controlrt.perf.machine import commit, installed_versions, this_machine
from controlrt.perf.models import CONTROL, MODELS, bench_directory, prepare_model
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.cuda.device import MAIN
from controlrt.runtime.executors.cuda import CudaExecutor
from controlrt.runtime.profile import ShapeProfile

BASE = "all"
WITHOUT = ("LoneLayerNorm", "PointwiseConvolution", "SkipGroupNorm", "BiasAdd")
UNET_IN_ONE, ONE_STREAM = "unet in one", "one stream"
STEPS = 20


@contextlib.contextmanager
def built_as(variant: str) -> Iterator[None]:
    """Builds within are of that variant."""
    if variant == UNET_IN_ONE:
        with patch.object(compiler, "split_step", lambda _: None):
            yield
        return
    left_out = variant.removeprefix("without ")
    kept = tuple(each for each in CudaBackend.passes if type(each).__name__ != left_out)
    with patch.object(CudaBackend, "passes", kept):
        yield


def load(variant: str, path: Path) -> ControlNetPipeline:
    """A pipeline of the variant, with its plan captured."""
    streams = patch.object(CudaExecutor, "_stream", lambda *_: MAIN)
    with streams if variant == ONE_STREAM else contextlib.nullcontext():
        pipeline = ControlNetPipeline.load(path, verify=False)
        draw(pipeline, 0)
    return pipeline


def draw(pipeline: ControlNetPipeline, seed: int) -> Any:
    """One picture under control, with its timings."""
    width, height = pipeline.bundle.manifest.profile.default_size
    hint = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return pipeline("a cat", {CONTROL: hint}, num_inference_steps=STEPS, seed=seed, output_type="np").timings


def measured(pipelines: dict[str, ControlNetPipeline], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step by variant, one value a round."""
    steps: dict[str, list[float]] = {name: [] for name in pipelines}
    names: Sequence[str] = list(pipelines)
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            steps[name].append(1e3 * float(np.median(draw(pipelines[name], number).steps)))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, pipelines = prepare_model(arguments.model), {}
    for variant in (BASE, UNET_IN_ONE, *(f"without {name}" for name in WITHOUT)):
        options = BuildOptions(
            model=model.source,
            controlnets=model.controls,
            profile=ShapeProfile.parse("512x512"),
            output=bench_directory() / "cuda-passes" / f"{model.name} {variant}".replace(" ", "-"),
            backend="cuda",
            precision="fp16",
            measure=False,
        )
        with built_as(variant):
            build(options, "perf/cuda_passes.py")
        pipelines[variant] = load(variant, options.output)
        if variant == BASE:
            pipelines[ONE_STREAM] = load(ONE_STREAM, options.output)
    steps = measured(pipelines, arguments.rounds)
    for name, milliseconds in steps.items():
        ratio = np.median(np.divide(milliseconds, steps[BASE]))
        print(f"{name:<28} {np.median(milliseconds):7.3f} ms a step, {ratio:.3f} of {BASE}")
    report = {
        "benchmark": "cuda-passes",
        "model": arguments.model,
        "command": shlex.join(["python", *sys.argv]),
        "machine": msgspec.to_builtins(this_machine()),
        "commit": msgspec.to_builtins(commit(Path(__file__).parent)),
        "versions": installed_versions(),
        "step_milliseconds": steps,
    }
    if arguments.output:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    main()
