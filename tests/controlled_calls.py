"""Calls of the demo model that take every way through a plan, for tests that compare what two executors draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlrt.runtime import ControlNetPipeline

PROMPT = "a red star on a light blue background"
STEPS = 3


def square(start: int = 120) -> Image.Image:
    picture = np.zeros((512, 512, 3), np.uint8)
    picture[start : start + 250, 130:380] = 255
    return Image.fromarray(picture)


def draw(pipe: ControlNetPipeline, prompt: str = PROMPT, **changes: Any) -> NDArray[np.float32]:
    """Latents, or pictures with ``output_type="np"``."""
    options: dict[str, Any] = {
        "image": {"mask": square()},
        "num_inference_steps": STEPS,
        "seed": 3,
        "output_type": "latent",
        **changes,
    }
    return pipe(prompt, **options).images


CALLS: dict[str, dict[str, Any]] = {
    "one control": {},
    "two controls, a window, a curve": {
        "image": {"mask": square(), "canny": square(90)},
        "control_guidance_end": {"mask": 0.5, "canny": 1.0},
        "controlnet_conditioning_scale": {"mask": [1.0, 0.6, 0.2], "canny": 0.5},
    },
    "guess mode beside a plain control": {
        "image": {"mask": square(), "canny": square(90)},
        "control_mode": {"mask": "controlnet", "canny": "balanced"},
    },
    "no control": {"image": None},
    "no guidance": {"guidance_scale": 1.0},
    "guidance window": {"guidance_start": 0.4},
    "four pictures, with noise at each step": {"num_images_per_prompt": 4, "scheduler": "Euler a"},
    "inpainting": {"init_image": square(60), "mask_image": square(200)},
    "other text": {"prompt": "a black moon", "negative_prompt": "blurred"},
}
CHANGES: list[dict[str, Any]] = [
    {"seed": 4},
    {"controlnet_conditioning_scale": 0.3},
    {"guidance_scale": 3.0},
    {"image": {"mask": square(40)}},
    {"prompt": "a black moon"},
]
"""Of one call, which leave its layout as it was."""
