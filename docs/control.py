"""Draws the contact sheets of control.md with the demo model.

pip install 'controlrt[annotate]'
python docs/control.py bundles/demo-512x512
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contact_sheet import contact_sheet
from PIL import Image, ImageDraw

from controlrt.demo.scenes import Scene, sample_scene
from controlrt.runtime import ControlNetPipeline

IMAGES = Path(__file__).parent / "images"
SIDE, COLUMNS, TILE = 512, 6, 160
SHARED: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 7.5, "seed": 7}


def scene(seed: int) -> Scene:
    return sample_scene(np.random.default_rng(seed))


def hint(one: Scene, control: str = "canny") -> Image.Image:
    return Image.fromarray(one.control(control, SIDE))


def half(left: bool) -> Image.Image:
    """One half of the picture."""
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((0 if left else SIDE // 2, 0, SIDE // 2 - 1 if left else SIDE, SIDE), fill=255)
    return mask


def draw_sheets(pipeline: ControlNetPipeline) -> dict[str, dict[str, Image.Image]]:
    """Pictures by caption, by sheet."""

    def draw(prompt: str, image: Any, **options: Any) -> Image.Image:
        return pipeline(prompt, image, **{**SHARED, **options}).images[0]

    one, other = scene(3), scene(8)
    edges = {"canny": hint(one)}

    def sweep(caption: str, values: list[Any], option: Callable[[Any], dict[str, Any]]) -> dict[str, Image.Image]:
        return {caption.format(value): draw(one.prompt, edges, **option(value)) for value in values}

    sheets = {
        "scale": sweep("scale {}", [0, 0.25, 0.5, 0.75, 1, 1.5], lambda v: {"controlnet_conditioning_scale": v}),
        "window": {
            **sweep("until {}", [0.1, 0.3, 0.6], lambda v: {"control_guidance_end": v}),
            **sweep("from {}", [0.1, 0.3, 0.6], lambda v: {"control_guidance_start": v}),
        },
        "modes": {
            "balanced": draw(one.prompt, edges),
            "prompt": draw(one.prompt, edges, control_mode="prompt"),
            "controlnet": draw(one.prompt, edges, control_mode="controlnet"),
            "guess_mode": draw(one.prompt, edges, guess_mode=True, guidance_scale=4),
            "guess_mode original": draw(one.prompt, edges, guess_mode="original", guidance_scale=4),
            "guess_mode, no prompt": draw("", edges, guess_mode="original", guidance_scale=4),
        },
    }
    pair = {"canny": hint(one), "mask": hint(other, "mask")}
    sheets["two"] = {
        "canny": pair["canny"],
        "mask": pair["mask"],
        "canny alone": draw(one.prompt, edges),
        "mask alone": draw(one.prompt, {"mask": pair["mask"]}),
        "both": draw(one.prompt, pair),
        "each its half": draw(one.prompt, pair, control_region={"canny": half(True), "mask": half(False)}),
    }
    start = Image.fromarray(other.render(SIDE))
    hole = hint(one, "mask").convert("L")
    sheets["start"] = {
        "init_image": start,
        "mask_image": hole,
        "strength 0.5": draw(one.prompt, edges, init_image=start, strength=0.5),
        "strength 0.9": draw(one.prompt, edges, init_image=start, strength=0.9),
        "inpainted": draw(one.prompt, None, init_image=start, mask_image=hole),
        "inpainted, canny": draw(one.prompt, edges, init_image=start, mask_image=hole),
    }
    return sheets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    with ControlNetPipeline.load(parser.parse_args().bundle) as pipeline:
        for name, pictures in draw_sheets(pipeline).items():
            contact_sheet(pictures, COLUMNS, TILE).quantize(128).save(IMAGES / f"control-{name}.png", optimize=True)
            print(name, flush=True)


if __name__ == "__main__":
    main()
