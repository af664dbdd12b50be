"""Draws the pictures of samplers.md: coefficient curves, and one prompt by every sampler.

pip install 'controlrt[annotate,docs]'
python docs/samplers.py bundles/demo-512x512
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from contact_sheet import contact_sheet
from PIL import Image

from controlrt.demo.scenes import sample_scene
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.samplers import ALIASES, COLUMNS, compile_sampler

matplotlib.use("svg")
from matplotlib import pyplot  # after the backend is chosen

IMAGES = Path(__file__).parent / "images"
# the scheduler config of Stable Diffusion 1.5
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
CURVES = ("DDIM", "PLMS", "Euler", "Euler a", "Heun", "LMS", "DPM++ 2M Karras", "DPM++ 2M SDE", "UniPC")
STEPS, SEED, GUIDANCE, COLUMNS_OF_TILES = 20, 7, 7.5, 6


def draw_curves(target: Path) -> None:
    """The row of the next latents, over the calls of a run, for some samplers."""
    figure, axes = pyplot.subplots(3, 3, figsize=(12, 9), layout="constrained")
    for axis, name in zip(axes.flat, CURVES, strict=True):
        table = compile_sampler(name, CONFIG, STEPS)
        row = table.update[:, 0]
        labels = {0: "latents", COLUMNS - 3: "model output", COLUMNS - 2: "noise"}
        labels |= {1 + slot: kept for slot, kept in enumerate(table.history)}
        for column, label in labels.items():
            if row[:, column].any():
                axis.plot(row[:, column], marker=".", label=label, linestyle="--" if 0 < column < 6 else "-")
        axis.set_title(name)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("model call")
    figure.suptitle("what makes up the next latents: 20 steps, the schedule of Stable Diffusion 1.5, epsilon")
    pyplot.rcParams["svg.hashsalt"] = "controlrt"
    figure.savefig(target, metadata={"Date": None})


def draw_pictures(bundle: Path, target: Path) -> None:
    """One prompt, control and seed by every sampler with a familiar name."""
    scene = sample_scene(np.random.default_rng(3))
    hint = Image.fromarray(scene.control("canny", 512))
    tiles = {"control": hint}
    with ControlNetPipeline.load(bundle) as pipeline:
        for name in ALIASES:
            output = pipeline(
                scene.prompt,
                {"canny": hint},
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                seed=SEED,
                scheduler=name,
            )
            tiles[name] = output.images[0]
            print(f"{name}: {len(output.timings.steps)} calls", flush=True)
    contact_sheet(tiles, COLUMNS_OF_TILES).save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    arguments = parser.parse_args()
    draw_curves(IMAGES / "sampler-coefficients.svg")
    draw_pictures(arguments.bundle, IMAGES / "samplers.png")


if __name__ == "__main__":
    main()
