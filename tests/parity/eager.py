"""diffusers' own pipelines in eager PyTorch, and how pictures are compared with theirs."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.demo.scenes import sample_scene

PROMPT = "a red star on a light blue background"


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(-10 * np.log10(np.mean((found.astype(np.float64) - expected) ** 2) + 1e-20))


def hints(side: int, count: int) -> list[Image.Image]:
    rng = np.random.default_rng(11)
    return [Image.fromarray(sample_scene(rng).control("canny", side)) for _ in range(count)]


def demo_reference(*controls: str) -> Any:
    """diffusers' ControlNet pipeline on the demo model, float32."""
    loaded = [diffusers.ControlNetModel.from_pretrained(CONTROLNETS[name]).float() for name in controls]
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        MODEL_DIR, controlnet=loaded if len(loaded) > 1 else loaded[0], safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)
