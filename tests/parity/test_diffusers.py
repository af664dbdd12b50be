"""End to end against diffusers' own pipelines in eager PyTorch: same checkpoint, seed, prompt, hint.

Float32 on both sides. What is drawn is held to the bounds of parity/eager.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity.eager import (
    LATENTS_BOUND,
    PROMPT,
    PSNR_BOUND,
    check_same,
    decoded,
    demo_reference,
    hints,
    psnr,
    relative,
)
from PIL import Image

from controlrt.demo.scenes import sample_scene
from controlrt.runtime import ControlNetPipeline
from families import CONTROLS, FAMILIES, SIDE, Family

NEGATIVE = "a green moon"


every_family = pytest.mark.parametrize("family", list(FAMILIES), indirect=True, scope="module")


@every_family
@pytest.mark.parametrize("controls", [CONTROLS[:1], CONTROLS])
@pytest.mark.parametrize("scale", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_same_picture(
    compiled: ControlNetPipeline, family: Family, controls: tuple[str, ...], scale: float, guidance_scale: float
) -> None:
    check_same_picture(
        compiled, family.reference(*controls), controls, hints(SIDE, len(controls)), scale, guidance_scale, steps=4
    )


def check_same_picture(
    compiled: ControlNetPipeline,
    reference: Any,
    controls: tuple[str, ...],
    pictures: list[Image.Image],
    scale: float,
    guidance_scale: float,
    steps: int,
) -> None:
    shared = {"negative_prompt": NEGATIVE, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    single = len(controls) == 1
    expected = reference(
        PROMPT,
        image=pictures[0] if single else pictures,
        controlnet_conditioning_scale=scale if single else [scale] * len(controls),
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="latent",
        **shared,
    ).images.numpy()
    latents, image = (
        compiled(
            PROMPT,
            dict(zip(controls, pictures, strict=True)),
            controlnet_conditioning_scale=scale,
            seed=7,
            output_type=output_type,
            **shared,
        ).images
        for output_type in ("latent", "np")
    )
    assert relative(latents, expected) < LATENTS_BOUND
    assert psnr(image, decoded(reference, expected)) > PSNR_BOUND


@pytest.mark.parametrize("controls", [("canny",), ("mask",), ("canny", "mask")])
@pytest.mark.parametrize("scale", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_same_picture_of_the_demo_model(
    demo: ControlNetPipeline, controls: tuple[str, ...], scale: float, guidance_scale: float
) -> None:
    scene = sample_scene(np.random.default_rng(22))
    pictures = [Image.fromarray(scene.control(name, 512)) for name in controls]
    check_same_picture(demo, demo_reference(*controls), controls, pictures, scale, guidance_scale, steps=2)


def test_pixels_that_an_inpainting_controlnet_shall_paint(demo: ControlNetPipeline) -> None:
    """They are -1 in the control picture, whatever the ControlNet was trained for."""
    scene = sample_scene(np.random.default_rng(22))
    known = np.asarray(Image.fromarray(scene.control("mask", 512)).convert("RGB"), np.float32) / 255
    known[180:300, 100:400] = 0
    hint = known.copy()
    hint[180:300, 100:400] = -1
    shared: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    reference = demo_reference("mask")
    expected = reference(
        PROMPT,
        image=torch.from_numpy(hint).permute(2, 0, 1)[None],
        generator=torch.Generator("cpu").manual_seed(7),
        **shared,
    ).images
    found, black = (demo(PROMPT, {"mask": picture}, seed=7, **shared).images for picture in (hint, known))
    check_same(demo, found, reference, expected)
    assert relative(found, black) > 10 * LATENTS_BOUND


@every_family
def test_without_control(compiled: ControlNetPipeline, family: Family) -> None:
    reference = family.reference()
    shared = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent", "width": SIDE, "height": SIDE}
    expected = reference(PROMPT, generator=torch.Generator().manual_seed(3), **shared).images
    check_same(compiled, compiled(PROMPT, seed=3, **shared).images, reference, expected)


@every_family
def test_windows_and_scales_by_control(compiled: ControlNetPipeline, family: Family) -> None:
    """Each ControlNet with its own scale and window, at steps where diffusers' rounding rule bites."""
    pictures = hints(SIDE, 2)
    window = {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.5, 1.0]}
    scales = [0.4, 1.1]
    shared = {"num_inference_steps": 7, "guidance_scale": 3.0, "output_type": "latent", **window}
    reference = family.reference(*CONTROLS)
    expected = reference(
        PROMPT,
        image=pictures,
        controlnet_conditioning_scale=scales,
        generator=torch.Generator().manual_seed(5),
        **shared,
    ).images
    found = compiled(
        PROMPT,
        dict(zip(CONTROLS, pictures, strict=True)),
        controlnet_conditioning_scale=scales,
        seed=5,
        **shared,
    ).images
    check_same(compiled, found, reference, expected)


@pytest.mark.parametrize("family", ["sd21"], indirect=True, scope="module")
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_guess_mode(compiled: ControlNetPipeline, family: Family, guidance_scale: float) -> None:
    """Of the other families, and with several controls: test_control.py."""
    shared = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "guess_mode": True, "output_type": "latent"}
    (hint,) = hints(SIDE, 1)
    reference = family.reference("first")
    expected = reference(PROMPT, image=hint, generator=torch.Generator().manual_seed(5), **shared).images
    found = compiled(PROMPT, {"first": hint}, seed=5, **shared).images
    check_same(compiled, found, reference, expected)


@pytest.mark.parametrize("family", ["sd15", "sdxl"], indirect=True, scope="module")
def test_batches_follow_diffusers(compiled: ControlNetPipeline, family: Family) -> None:
    """Two prompts, two pictures each, a hint for each prompt, and both seed rules."""
    pictures = hints(SIDE, 2)
    prompts = [PROMPT, "a black circle on an orange background"]
    shared = {"num_inference_steps": 4, "num_images_per_prompt": 2, "output_type": "latent"}
    reference = family.reference("first")
    for seed in (9, [1, 2, 3, 4]):
        seeds = [seed] if isinstance(seed, int) else seed
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        generator = generators[0] if isinstance(seed, int) else generators
        expected = reference(prompts, image=pictures, generator=generator, guidance_scale=6.0, **shared).images
        found = compiled(prompts, {"first": pictures}, seed=seed, guidance_scale=6.0, **shared).images
        assert found.shape[0] == 4
        check_same(compiled, found, reference, expected)


def test_scale_changes_the_picture_smoothly(demo: ControlNetPipeline) -> None:
    """A small change of scale moves the latents a little, a large one more."""
    scene = sample_scene(np.random.default_rng(23))
    hint = {"mask": Image.fromarray(scene.control("mask", 512))}

    def latents(scale: float) -> NDArray[np.float32]:
        return demo(
            scene.prompt,
            hint,
            num_inference_steps=8,
            controlnet_conditioning_scale=scale,
            seed=2,
            output_type="latent",
        ).images

    base = latents(0.7)
    small, large = relative(latents(0.701), base), relative(latents(1.0), base)
    assert 0 < small < 0.02
    assert large > 5 * small
