"""Draws the contact sheets of control.md with the demo model.

pip install 'controlrt[annotate]'
python docs/control.py bundles/demo-512x512
python docs/control.py bundles/demo-512x512 --only adapter

The sheet of the T2I-Adapter takes ``pip install 'controlrt[export]'``, to build a bundle with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from contact_sheet import contact_sheet
from PIL import Image, ImageDraw

from controlrt.demo import ADAPTERS, CONTROLNETS, MODEL_DIR
from controlrt.demo.scenes import Scene, sample_scene
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.storage import cache_root

IMAGES = Path(__file__).parent / "images"
SIDE, COLUMNS, TILE = 512, 6, 160
SHEETS = ("scale", "window", "modes", "two", "start", "inpaint", "adapter")
ADAPTER = "color"
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


def around(shape: Image.Image, margin: int) -> Image.Image:
    """The box around what is white, with a margin, in white."""
    left, top, right, bottom = shape.convert("L").getbbox() or (0, 0, SIDE, SIDE)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((left - margin, top - margin, right + margin, bottom + margin), fill=255)
    return mask


class Sheets:
    """Pictures by caption, one method for each sheet."""

    def __init__(self, pipeline: ControlNetPipeline) -> None:
        self.pipeline = pipeline
        self.one, self.other = scene(3), scene(8)
        self.edges = {"canny": hint(self.one)}
        self.start_image = Image.fromarray(self.other.render(SIDE))

    def draw(self, prompt: str, image: Any, **options: Any) -> Image.Image:
        """One picture, with what all of them share."""
        return self.pipeline(prompt, image, **{**SHARED, **options}).images[0]

    def sweep(
        self, caption: str, values: list[Any], option: Callable[[Any], dict[str, Any]], image: Any = None
    ) -> dict[str, Image.Image]:
        """Pictures of one prompt over the values of an option."""
        hints = self.edges if image is None else image
        return {caption.format(value): self.draw(self.one.prompt, hints, **option(value)) for value in values}

    def scale(self) -> dict[str, Image.Image]:
        """How strongly."""
        return self.sweep("scale {}", [0, 0.25, 0.5, 0.75, 1, 1.5], lambda v: {"controlnet_conditioning_scale": v})

    def window(self) -> dict[str, Image.Image]:
        """When."""
        return {
            **self.sweep("until {}", [0.1, 0.3, 0.6], lambda v: {"control_guidance_end": v}),
            **self.sweep("from {}", [0.1, 0.3, 0.6], lambda v: {"control_guidance_start": v}),
        }

    def modes(self) -> dict[str, Image.Image]:
        """Control modes and guess modes."""
        one, edges = self.one, self.edges
        return {
            "balanced": self.draw(one.prompt, edges),
            "prompt": self.draw(one.prompt, edges, control_mode="prompt"),
            "controlnet": self.draw(one.prompt, edges, control_mode="controlnet"),
            "guess_mode": self.draw(one.prompt, edges, guess_mode=True, guidance_scale=4),
            "guess_mode original": self.draw(one.prompt, edges, guess_mode="original", guidance_scale=4),
            "guess_mode, no prompt": self.draw("", edges, guess_mode="original", guidance_scale=4),
        }

    def two(self) -> dict[str, Image.Image]:
        """Two ControlNets, alone, together and each in its half."""
        prompt = self.one.prompt
        pair = {"canny": hint(self.one), "mask": hint(self.other, "mask")}
        return {
            "canny": pair["canny"],
            "mask": pair["mask"],
            "canny alone": self.draw(prompt, self.edges),
            "mask alone": self.draw(prompt, {"mask": pair["mask"]}),
            "both": self.draw(prompt, pair),
            "each its half": self.draw(prompt, pair, control_region={"canny": half(True), "mask": half(False)}),
        }

    def start(self) -> dict[str, Image.Image]:
        """Picture to picture."""
        shared = {"init_image": self.start_image}
        return {
            "init_image": self.start_image,
            "canny": self.edges["canny"],
            **self.sweep("strength {}", [0.3, 0.5, 0.7, 0.9], lambda v: {**shared, "strength": v}),
        }

    def inpaint(self) -> dict[str, Image.Image]:
        """The shape of one scene in a box of the other, whose background it is to have."""
        prompt = replace(self.one, background=self.other.background).prompt
        shared = {"init_image": self.start_image, "mask_image": around(hint(self.one, "mask"), SIDE // 12)}
        return {
            **shared,
            "no control": self.draw(prompt, None, **shared),
            "canny": self.draw(prompt, self.edges, **shared),
            "canny, until 0.3": self.draw(prompt, self.edges, control_guidance_end=0.3, **shared),
            "canny, strength 0.6": self.draw(prompt, self.edges, strength=0.6, **shared),
        }

    def adapter(self) -> dict[str, Image.Image]:
        """Needs a pipeline with the T2I-Adapter."""
        grid = {ADAPTER: hint(self.one, ADAPTER)}
        guidance = {"guidance_scale": 3}
        return {
            "colour grid": grid[ADAPTER],
            **self.sweep("scale {}", [0, 0.5, 1], lambda v: {"controlnet_conditioning_scale": v, **guidance}, grid),
            **self.sweep("until {}", [0.3], lambda v: {"control_guidance_end": v, **guidance}, grid),
            "with canny": self.draw(self.one.prompt, {**self.edges, **grid}, **guidance),
        }


def adapter_bundle() -> Path:
    """The demo model with the T2I-Adapter and the ControlNet for edges, built where it is missing."""
    from controlrt.engines.build import BuildOptions, build
    from controlrt.runtime.profile import ShapeProfile

    options = BuildOptions(
        model=str(MODEL_DIR),
        controlnets={"canny": str(CONTROLNETS["canny"])},
        adapters={ADAPTER: str(ADAPTERS[ADAPTER])},
        profile=ShapeProfile.parse(f"{SIDE}x{SIDE}"),
        output=cache_root() / "docs" / "demo-adapter",
    )
    return build(options, "docs/control.py").bundle.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", choices=SHEETS, action="append", help="a sheet to draw; all where none is named")
    arguments = parser.parse_args()
    for name in arguments.only or SHEETS:
        bundle = adapter_bundle() if name == "adapter" else arguments.bundle
        with ControlNetPipeline.load(bundle) as pipeline:
            pictures = getattr(Sheets(pipeline), name)()
        contact_sheet(pictures, COLUMNS, TILE).quantize(128).save(IMAGES / f"control-{name}.png", optimize=True)
        print(name, flush=True)


if __name__ == "__main__":
    main()
