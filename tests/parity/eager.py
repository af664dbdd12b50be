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
from controlrt.runtime import ControlNetPipeline

PROMPT = "a red star on a light blue background"
LATENTS_BOUND, PSNR_BOUND = 1e-3, 50.0
"""What the project promises: latents' relative error and pictures' PSNR in dB. Rounding alone gives 1e-6 and 100."""


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(-10 * np.log10(np.mean((found.astype(np.float64) - expected) ** 2) + 1e-20))


def decoded(reference: Any, latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """What diffusers' VAE makes of latents: (batch, height, width, 3) in [0, 1]."""
    scaled = torch.from_numpy(latents) / reference.vae.config.scaling_factor
    return reference.image_processor.postprocess(reference.vae.decode(scaled, return_dict=False)[0], output_type="np")


def check_same(pipeline: ControlNetPipeline, found: NDArray[np.float32], reference: Any, expected: Any) -> None:
    """Asserts that latents are the same, and so is each picture that either side's VAE makes of its own.

    Args:
        pipeline: drew ``found``: (batch, channels, height/8, width/8).
        reference: diffusers' pipeline, whose latents are ``expected``, of the same shape, as a tensor or an array.
    """
    expected = np.asarray(expected)
    error = relative(found, expected)
    pairs = zip(pipeline._vae.decode(found), decoded(reference, expected), strict=True)
    worst = min(psnr(*pair) for pair in pairs)
    assert error < LATENTS_BOUND, f"latents are off by {error:.1e}"
    assert worst > PSNR_BOUND, f"pictures are {worst:.1f} dB apart"


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
