"""The demo model's own T2I-Adapter in the runtime, against diffusers' pipeline on the same weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from parity.eager import LATENTS_BOUND, check_same, relative
from PIL import Image

from controlrt.demo import ADAPTERS, MODEL_DIR
from controlrt.demo.scenes import sample_scene
from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.profile import ShapeProfile

SIDE = 256

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_same_picture(scale: float) -> None:
    output = Path(os.environ["CONTROLRT_CACHE"]) / "tests" / "demo-adapter-256x256"
    adapters = {name: str(path) for name, path in ADAPTERS.items()}
    profile = ShapeProfile.parse(f"{SIDE}x{SIDE}")
    options = BuildOptions(model=str(MODEL_DIR), controlnets={}, adapters=adapters, profile=profile, output=output)
    build(options, "pytest")
    scene = sample_scene(np.random.default_rng(30))
    grid = Image.fromarray(scene.control("color", SIDE))
    shared: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "latent"}
    adapter = diffusers.T2IAdapter.from_pretrained(ADAPTERS["color"]).float()
    reference = diffusers.StableDiffusionAdapterPipeline.from_pretrained(MODEL_DIR, adapter=adapter).to(torch.float32)
    reference.set_progress_bar_config(disable=True)
    latents = reference(
        scene.prompt,
        grid,
        height=SIDE,
        width=SIDE,
        adapter_conditioning_scale=scale,
        generator=torch.Generator().manual_seed(7),
        **shared,
    ).images
    with ControlNetPipeline.load(output) as pipeline:
        found = pipeline(scene.prompt, {"color": grid}, controlnet_conditioning_scale=scale, seed=7, **shared).images
        check_same(pipeline, found, reference, latents)
        assert relative(found, pipeline(scene.prompt, seed=7, **shared).images) > 10 * LATENTS_BOUND
