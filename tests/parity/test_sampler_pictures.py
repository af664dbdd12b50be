"""Whole pictures with every sampler against diffusers: same checkpoint, config, seed, prompt and hint, float32.

The draws that samplers make on the way are diffusers' own here, from one generator in its order; only the Brownian tree
of DPM++ SDE, which has a seed of its own in diffusers, is replaced by a path from that generator.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity.eager import LATENTS_BOUND, PROMPT, check_same, demo_reference, hints, psnr, relative
from parity.reference_samplers import reference, scheduler_class
from PIL import Image

from controlrt.demo.scenes import sample_scene
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.samplers import SAMPLERS
from families import CONTROLS, SIDE, Family

PSNR_BOUND = 45.0
"""Of the demo model after up to 50 steps."""
GUIDANCE = 3.0
BROWNIAN = "DPMSolverSDEScheduler"


def expected_picture(
    pipeline: Any, prompt: str, hint: Image.Image, name: str, steps: int, seeds: list[int], output_type: str
) -> NDArray[np.float32]:
    """diffusers' picture or latents by sampler ``name``."""
    cls = scheduler_class(name)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    side = hint.size[0] // 8

    def draw() -> NDArray[np.float32]:
        return torch.cat([torch.randn((1, 4, side, side), generator=one) for one in generators]).numpy()

    patched = reference(cls, draw, wide=False) if name == BROWNIAN else contextlib.nullcontext()
    with patched:
        config = pipeline.scheduler.config
        if name.startswith("EDM"):  # they have a schedule of their own, and other classes' null sigma_min stops them
            config = {"prediction_type": config["prediction_type"]}
        pipeline.scheduler = cls.from_config(config)
        images = pipeline(
            [prompt] * len(seeds),
            image=[hint] * len(seeds),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=generators if len(generators) > 1 else generators[0],
            output_type=output_type,
        ).images
    return np.asarray(images)


@pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")
@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_small_model(compiled: ControlNetPipeline, family: Family, name: str, steps: int) -> None:
    """Two pictures with a generator each, through the list-of-generators rule."""
    hint = hints(SIDE, 1)[0]
    pipeline = family.reference(CONTROLS[0])
    expected = expected_picture(pipeline, PROMPT, hint, name, steps, [7, 8], "latent")
    check_same(compiled, latents(compiled, hint, name, steps), pipeline, expected)


@pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")
@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_the_bound_tells_samplers_apart(compiled: ControlNetPipeline, steps: int) -> None:
    hint = hints(SIDE, 1)[0]
    for one, other in (("Euler", "LMS"), ("DPM++ 2M", "DEIS"), ("DPM++ 2M", "UniPC"), ("Euler", "Heun")):
        first, second = (latents(compiled, hint, name, steps) for name in (one, other))
        assert relative(first, second) > 2 * LATENTS_BOUND, (one, other)


def latents(pipeline: ControlNetPipeline, hint: Image.Image, name: str, steps: int) -> NDArray[np.float32]:
    return pipeline(
        [PROMPT] * 2,
        {CONTROLS[0]: hint},
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        seed=[7, 8],
        scheduler=name,
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    "steps", [4, pytest.param(20, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_demo_model(demo: ControlNetPipeline, name: str, steps: int) -> None:
    scene = sample_scene(np.random.default_rng(21))
    hint = Image.fromarray(scene.control("canny", 512))
    expected = expected_picture(demo_reference("canny"), scene.prompt, hint, name, steps, [7], "np")
    found = demo(
        scene.prompt,
        {"canny": hint},
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        seed=7,
        scheduler=name,
        output_type="np",
    ).images
    assert psnr(found, expected) > PSNR_BOUND
