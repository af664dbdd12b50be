"""Measures the demo model on unseen scenes: does it follow its control, does it obey its prompt?

    python demo/evaluate.py bundles/demo-512x512            # prints a table, writes demo/evaluation.json

controlrt.demo.scores says what is measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from controlrt.demo.scenes import HELD_OUT_SHAPES, TRAINED_SHAPES, sample_scene
from controlrt.demo.scores import score
from controlrt.runtime import ControlNetPipeline

SEED = 2024  # training scenes use other streams of random numbers
SCENES, STEPS, GUIDANCE = 64, 20, 7.5


def measure(
    pipeline: ControlNetPipeline, control: str, kinds: tuple[str, ...], scale: float, scenes: int, title: str
) -> tuple[dict[str, float], list[Image.Image]]:
    """Mean measures over scenes of the given shapes, and the first pictures."""
    rng = np.random.default_rng([SEED, len(kinds)])
    scores, pictures = [], []
    for index in tqdm(range(scenes), desc=title, leave=False):
        scene = sample_scene(rng, kinds)
        hint = Image.fromarray(scene.control(control, 512))
        output = pipeline(
            scene.prompt,
            {control: hint},
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            controlnet_conditioning_scale=scale,
            seed=SEED + index,
        )
        scores.append(score(scene, np.asarray(output.images[0])))
        if index < 8:
            pictures += [hint, output.images[0]]
    measures = ("iou", "shape_colour", "background_colour", "both_colours")
    return {name: round(float(np.mean([getattr(each, name) for each in scores])), 4) for name in measures}, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--control", action="append", metavar="NAME", help="one to measure; all where none is named")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--threads", type=int, help="CPU threads; all cores where not given")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "evaluation.json")
    parser.add_argument("--pictures", type=Path, help="write a sheet of the first pictures of each run here")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    started = time.monotonic()
    with ControlNetPipeline.load(arguments.bundle, threads=arguments.threads) as pipeline:
        runs = [
            (f"{control}, {label}, scale {scale:g}", control, kinds, scale)
            for control in arguments.control or pipeline.controls
            for label, kinds, scale in (
                ("trained shapes", TRAINED_SHAPES, 1.0),
                ("held-out shapes", HELD_OUT_SHAPES, 1.0),
                ("trained shapes", TRAINED_SHAPES, 0.0),
            )
        ]
        # scale 0 runs no ControlNet, so one control stands for all
        seen_without_control = False
        sheets = []
        for title, control, kinds, scale in runs:
            if scale == 0 and seen_without_control:
                continue
            seen_without_control |= scale == 0
            means, pictures = measure(pipeline, control, kinds, scale, arguments.scenes, title)
            results["no control" if scale == 0 else title] = means
            sheets.append(np.concatenate([np.asarray(picture.resize((160, 160))) for picture in pictures], axis=1))
            print(f"{'no control' if scale == 0 else title:<40} {means}", flush=True)
    report = {
        "scenes": arguments.scenes,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "seed": SEED,
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(time.monotonic() - started),
        "results": results,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.pictures:
        Image.fromarray(np.concatenate(sheets, axis=0)).save(arguments.pictures)


if __name__ == "__main__":
    main()
