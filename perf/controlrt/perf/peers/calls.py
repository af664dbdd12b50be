"""What contenders are asked to draw: seeded, and the same for all."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from controlrt.runtime.noise import generator

Array = NDArray[np.float32]

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple", "pink", "brown", "grey")
SHAPES = ("star", "circle", "square", "triangle", "moon", "cross", "ring", "heart", "arrow", "house", "tree", "boat")
HINTS = "white outlines of 3 to 6 circles, boxes and triangles on black"


class Call(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request for ``batch`` pictures. Each has its own seed, and that decides its prompt, hints and noise."""

    seed: int
    """Of the first picture; the others count on."""
    batch: int = 1
    width: int
    height: int
    steps: int
    sampler: str
    guidance_scale: float
    controls: tuple[str, ...]
    """All at scale 1, from the first step to the last."""

    @property
    def seeds(self) -> range:
        """One for each picture."""
        return range(self.seed, self.seed + self.batch)

    @property
    def prompts(self) -> list[str]:
        """One for each picture."""
        return [prompt(seed) for seed in self.seeds]

    def hints(self) -> dict[str, Array]:
        """(batch, height, width, 3) in [0, 1], by control."""
        return {
            name: np.stack([outlines((seed, number), self.width, self.height) for seed in self.seeds])
            for number, name in enumerate(self.controls)
        }

    def latents(self, channels: int, scale_factor: int) -> Array:
        """(batch, channels, height / scale factor, width / scale factor), as PyTorch's generator of a CPU draws it."""
        shape = (channels, self.height // scale_factor, self.width // scale_factor)
        return np.stack([generator("cpu", seed).randn(shape) for seed in self.seeds])


def prompt(seed: int) -> str:
    """What is asked for; 1,320 seeds in a row give as many prompts, so that no cache has it from a call before."""
    pairs = [(shape, background) for shape in COLOURS for background in COLOURS if shape != background]
    seed, thing = divmod(seed, len(SHAPES))
    colour, background = pairs[seed % len(pairs)]
    return f"a {colour} {SHAPES[thing]} on a {background} background"


def outlines(seed: tuple[int, ...], width: int, height: int) -> Array:
    """A control picture as an edge detector would make it: (height, width, 3) in [0, 1]."""
    rng = np.random.default_rng(seed)
    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(3, 7)):
        radius = rng.uniform(0.08, 0.3) * min(width, height)
        x, y = rng.uniform(0.1, 0.9, 2) * (width, height)
        box = (x - radius, y - radius, x + radius, y + radius)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse(box, outline=255, width=2)
        elif kind == 1:
            draw.rectangle(box, outline=255, width=2)
        else:
            draw.regular_polygon((x, y, radius), 3, rotation=int(rng.integers(360)), outline=255, width=2)
    return np.asarray(picture, np.float32)[..., None].repeat(3, axis=2) / np.float32(255)
