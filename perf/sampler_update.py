"""Measures what the sampler's update costs inside a step: the UNet program with it, and cut off before it.

    python perf/sampler_update.py bundles/demo-512x512 -o perf/results/sampler-update.json

The bundle is one for ONNX Runtime. Both graphs run in one process in turns (A B B A), on the same inputs, with
guidance; times are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.plan import Layout, StepLayout, plan_denoising
from controlrt.runtime.samplers import compile_sampler, known_names

CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "skip_prk_steps": True,
}


def without_update(file: Path, target: Path) -> None:
    """Writes the graph that ends at the guided model output."""
    graph = onnx.load(file, load_external_data=False).graph
    # the update concatenates latents, history, output, noise and the clipped prediction
    (seen,) = (node for node in graph.node if node.op_type == "Concat" and "history" in node.input)
    needed = [tensor.name for tensor in graph.input if tensor.name not in ("history", "noise", "update", "clip")]
    onnx.utils.extract_model(str(file), str(target), needed, [seen.input[2]])


Run = tuple[onnxruntime.InferenceSession, dict[str, np.ndarray]]


def seconds(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Times of each run, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            session, feeds = runs[name]
            started = time.perf_counter()
            session.run(None, feeds)
            times[name].append(time.perf_counter() - started)
    return times


def compile_milliseconds(steps: int) -> dict[str, float]:
    """Best of ten compilations of each sampler's table."""
    best = {}
    for name in known_names():
        count = min(steps, 50) if name.startswith(("LCM", "TCD")) else steps

        def once(name: str = name, count: int = count) -> float:
            started = time.perf_counter()
            compile_sampler(name, CONFIG, count)
            return time.perf_counter() - started

        best[name] = round(1000 * min(once() for _ in range(10)), 3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    width, height = bundle.manifest.profile.default_size
    layout = Layout(width=width, height=height, batch=1, draws=False, steps=(StepLayout(controls=(), guided=True),))
    plan = plan_denoising(bundle.manifest, layout)
    rng = np.random.default_rng(0)
    feeds = {}
    for name, view in plan.steps[0][0].inputs.items():
        shape, dtype = plan.buffers[view.buffer]
        shape = shape if view.step is None else shape[1:]
        feeds[name] = (rng.normal(size=shape) if dtype == "float32" else np.zeros(shape)).astype(dtype)
    file = bundle.file(bundle.manifest.program("unet.step").file)
    with tempfile.TemporaryDirectory() as directory:
        cut = Path(directory) / "cut.onnx"
        without_update(file, cut)
        short = open_session(cut)
        runs = {
            "step": (open_session(file), feeds),
            "without_update": (short, {one.name: feeds[one.name] for one in short.get_inputs()}),
        }
        seconds(runs, 10)  # warm-up
        times = seconds(runs, arguments.rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratios = np.array(times["step"]) / np.array(times["without_update"])
    resampled = np.random.default_rng(1).choice(ratios, (2000, len(ratios)))
    compiled = compile_milliseconds(999)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "rounds": arguments.rounds,
        "milliseconds": {name: round(1000 * value, 3) for name, value in medians.items()},
        "ratio": round(float(np.median(ratios)), 5),
        "ratio_95": [round(float(value), 5) for value in np.quantile(np.median(resampled, axis=1), [0.025, 0.975])],
        "compile_999_steps_milliseconds": {"slowest": max(compiled.values()), **compiled},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
