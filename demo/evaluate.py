"""Measures the demo model on unseen scenes: does it follow its control, does it obey its prompt?

    python demo/evaluate.py bundles/demo-512x512            # prints a table, writes demo/evaluation.json

Shape IoU compares the scene's filled silhouette with the picture's foreground: the pixels closer to the named
colour than to the colour of the picture's border. Colours are right when the median colour over the shapes,
and over the background, is nearest to the named colour among the palette.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from controlrt.demo.scenes import HELD_OUT_SHAPES, PALETTE, TRAINED_SHAPES, Scene, sample_scene
from controlrt.runtime import ControlNetPipeline

SEED = 2024  # training scenes use other streams of random numbers
SCENES, STEPS, GUIDANCE = 64, 20, 7.5
BORDER = 0.03  # nothing is drawn this close to the border, so it shows the background's colour


def foreground(picture: NDArray[np.uint8], colour: str) -> NDArray[np.bool_]:
    """Pixels of the picture that belong to shapes: (height, width).

    The background's colour is the median over the border; a pixel is foreground where it is closer to the named
    colour than to that.
    """
    values = picture.astype(np.float32)
    width = max(2, round(BORDER * len(picture)))
    ring = np.ones(picture.shape[:2], bool)
    ring[width:-width, width:-width] = False
    background = np.median(values[ring], axis=0)
    to_background = np.linalg.norm(values - background, axis=-1)
    to_colour = np.linalg.norm(values - np.float32(PALETTE[colour]), axis=-1)
    return to_colour < to_background


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def nearest_colour(pixels: NDArray[np.uint8]) -> str:
    """Name of the palette colour nearest to the median of (n, 3) pixels."""
    median = np.median(pixels.astype(np.float32), axis=0)
    return min(PALETTE, key=lambda name: float(np.linalg.norm(median - np.float32(PALETTE[name]))))


def score(scene: Scene, picture: NDArray[np.uint8]) -> dict[str, float]:
    """Measures of one picture against the scene that it was controlled by."""
    silhouette = scene.silhouette(len(picture))
    kernel = np.ones((9, 9), np.uint8)
    inside = cv2.erode(silhouette.astype(np.uint8), kernel).astype(bool)
    outside = ~cv2.dilate(silhouette.astype(np.uint8), kernel).astype(bool)
    return {
        "iou": iou(silhouette, foreground(picture, scene.colour)),
        "shape_colour": float(nearest_colour(picture[inside]) == scene.colour),
        "background_colour": float(nearest_colour(picture[outside]) == scene.background),
    }


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
    means = {key: round(float(np.mean([score[key] for score in scores])), 4) for key in scores[0]}
    means["both_colours"] = round(float(np.mean([s["shape_colour"] * s["background_colour"] for s in scores])), 4)
    return means, pictures


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
