"""Picture to picture and inpainting against diffusers' own pipelines, on the same checkpoints, pictures and seeds."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from parity.eager import PROMPT, check_same, hints, relative
from PIL import Image

from controlrt.demo.scenes import sample_scene
from controlrt.runtime import ControlNetPipeline, hires_fix
from controlrt.runtime.annotators import annotate
from families import SIDE, Family

SHARED: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0}

on = {
    name: pytest.mark.parametrize("family", [name], indirect=True, scope="module")
    for name in ("sd15", "sdxl", "inpainting", "inpainting_2", "inpainting_xl")
}


def start() -> Image.Image:
    return Image.fromarray(sample_scene(np.random.default_rng(3)).render(SIDE))


def mask() -> Image.Image:
    """A disc, with a soft rim that is cut at one half."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    return Image.fromarray((255 * np.clip(1.5 - 4 * np.hypot(x, y), 0, 1)).astype(np.uint8))


def reference(family: Family, kind: str, scheduler: str | None = None, controls: tuple[str, ...] = ("first",)) -> Any:
    """diffusers' pipeline with ControlNets, for "Img2Img" or "Inpaint"."""
    loaded = [diffusers.ControlNetModel.from_pretrained(family.controlnets[name]) for name in controls]
    cls = getattr(diffusers, f"StableDiffusion{'XL' if family.name == 'sdxl' else ''}ControlNet{kind}Pipeline")
    pipeline = cls.from_pretrained(family.model, controlnet=loaded if len(loaded) > 1 else loaded[0])
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    return pipeline


def generator(seed: int | list[int]) -> Any:
    one = torch.Generator("cpu").manual_seed
    return [torch.Generator("cpu").manual_seed(each) for each in seed] if isinstance(seed, list) else one(seed)


@on["sd15"]
@pytest.mark.parametrize("strength", [0.35, 0.8, 1.0])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_picture_to_picture(compiled: ControlNetPipeline, family: Family, strength: float, scheduler: str) -> None:
    check_picture_to_picture(compiled, family, strength, scheduler)


@on["sdxl"]
def test_picture_to_picture_xl(compiled: ControlNetPipeline, family: Family) -> None:
    check_picture_to_picture(compiled, family, 0.7, "EulerDiscreteScheduler")


def check_picture_to_picture(compiled: ControlNetPipeline, family: Family, strength: float, scheduler: str) -> None:
    (hint,) = hints(SIDE, 1)
    pipeline = reference(family, "Img2Img", scheduler)
    latents = pipeline(
        PROMPT,
        image=start(),
        control_image=hint,
        strength=strength,
        controlnet_conditioning_scale=0.9,
        generator=generator(7),
        output_type="latent",
        **SHARED,
    ).images
    found = compiled(
        PROMPT,
        {"first": hint},
        init_image=start(),
        strength=strength,
        controlnet_conditioning_scale=0.9,
        scheduler=scheduler,
        seed=7,
        output_type="latent",
        **SHARED,
    ).images
    check_same(compiled, found, pipeline, latents)


MASKED: dict[str, Any] = {"mask_image": mask()}
"""What inpainting has beside picture to picture."""


@on["sd15"]
@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize(("kind", "given"), [("Img2Img", {}), ("Inpaint", MASKED)])
def test_windows_of_two_controls_in_what_strength_leaves(
    compiled: ControlNetPipeline, family: Family, kind: str, given: dict[str, Any], guess_mode: bool
) -> None:
    """They are fractions of the steps that are taken, four of six; at the first and the last one control acts alone."""
    pictures = hints(SIDE, 2)
    controls = ("first", "second")
    windows = {"control_guidance_start": [0.0, 0.25], "control_guidance_end": [0.75, 1.0]}
    shared = {"strength": 0.7, "guess_mode": guess_mode, "output_type": "latent", **given, **windows, **SHARED}
    pipeline = reference(family, kind, "EulerDiscreteScheduler", controls)
    latents = pipeline(
        PROMPT,
        image=start(),
        control_image=pictures,
        controlnet_conditioning_scale=[0.9, 1.2],
        generator=generator(7),
        **shared,
    ).images
    call = {
        "init_image": start(),
        "scheduler": "EulerDiscreteScheduler",
        "seed": 7,
        "controlnet_conditioning_scale": [0.9, 1.2],
    }
    image = dict(zip(controls, pictures, strict=True))
    found = compiled(PROMPT, image, **call, **shared).images
    check_same(compiled, found, pipeline, latents)
    for change in (
        {"control_guidance_start": 0.0},
        {"control_guidance_end": 1.0},
        {"guess_mode": not guess_mode},
    ):
        other = compiled(PROMPT, image, **call, **{**shared, **change}).images
        # late steps change little, so the bound of latents alone would not tell
        assert relative(found, other) > 10 * relative(found, np.asarray(latents))


@on["sd15"]
@pytest.mark.parametrize(("kind", "given"), [("Img2Img", {}), ("Inpaint", MASKED)])
def test_two_prompts(compiled: ControlNetPipeline, family: Family, kind: str, given: dict[str, Any]) -> None:
    """Each with noise of its own; picture, mask and control are those of both."""
    (hint,) = hints(SIDE, 1)
    shared = {"strength": 0.7, "controlnet_conditioning_scale": 0.9, "output_type": "latent", **given, **SHARED}
    prompts = [PROMPT, "a blue circle"]
    pipeline = reference(family, kind)
    latents = pipeline(prompts, image=start(), control_image=hint, generator=generator([7, 8]), **shared).images
    found = compiled(prompts, {"first": hint}, init_image=start(), seed=[7, 8], **shared).images
    check_same(compiled, found, pipeline, latents)
    assert relative(found[1], compiled(PROMPT, {"first": hint}, init_image=start(), seed=8, **shared).images[0]) > 0.01


@on["sd15"]
@pytest.mark.parametrize("seed", [7, [7, 8]])
def test_two_pictures_of_one(compiled: ControlNetPipeline, family: Family, seed: int | list[int]) -> None:
    (hint,) = hints(SIDE, 1)
    pipeline = reference(family, "Img2Img")
    latents = pipeline(
        PROMPT,
        image=start(),
        control_image=hint,
        strength=0.7,
        controlnet_conditioning_scale=1.0,
        num_images_per_prompt=2,
        generator=generator(seed),
        output_type="latent",
        **SHARED,
    ).images
    found = compiled(
        PROMPT,
        {"first": hint},
        init_image=start(),
        strength=0.7,
        num_images_per_prompt=2,
        seed=seed,
        output_type="latent",
        **SHARED,
    ).images
    check_same(compiled, found, pipeline, latents)


@on["sd15"]
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_inpainting_by_blending(compiled: ControlNetPipeline, family: Family, strength: float, scheduler: str) -> None:
    check_inpainting(compiled, family, strength, scheduler)


@on["sdxl"]
def test_inpainting_by_blending_xl(compiled: ControlNetPipeline, family: Family) -> None:
    check_inpainting(compiled, family, 0.6, "EulerDiscreteScheduler")


@on["inpainting"]
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_inpainting_by_a_unet_that_sees_the_mask(
    compiled: ControlNetPipeline, family: Family, strength: float, scheduler: str
) -> None:
    check_inpainting(compiled, family, strength, scheduler)


@pytest.mark.slow
@on["inpainting_2"]
def test_inpainting_by_a_unet_of_2_that_sees_the_mask(compiled: ControlNetPipeline, family: Family) -> None:
    check_inpainting(compiled, family, 0.6, "DDIMScheduler")


@pytest.mark.slow
@on["inpainting_xl"]
@pytest.mark.parametrize(("strength", "scheduler"), [(0.6, "EulerAncestralDiscreteScheduler"), (1.0, "DDIMScheduler")])
def test_inpainting_by_a_unet_of_xl_that_sees_the_mask(
    compiled: ControlNetPipeline, family: Family, strength: float, scheduler: str
) -> None:
    check_inpainting(compiled, family, strength, scheduler)


@on["sd15"]
def test_inpainting_with_pixels_of_minus_one(compiled: ControlNetPipeline, family: Family) -> None:
    """The control picture of an inpainting ControlNet, beside the mask."""
    hint = annotate("inpaint", start(), mask())
    assert hint.min() == -1
    check_inpainting(compiled, family, 1.0, "EulerDiscreteScheduler", hint)


def check_inpainting(
    compiled: ControlNetPipeline, family: Family, strength: float, scheduler: str, hint: Any = None
) -> None:
    (edges,) = hints(SIDE, 1)
    hint = edges if hint is None else hint
    pipeline = reference(family, "Inpaint", scheduler)
    latents = pipeline(
        PROMPT,
        image=start(),
        mask_image=mask(),
        control_image=torch.from_numpy(hint).permute(2, 0, 1)[None] if isinstance(hint, np.ndarray) else hint,
        strength=strength,
        controlnet_conditioning_scale=0.9,
        generator=generator(7),
        output_type="latent",
        **SHARED,
    ).images
    found = compiled(
        PROMPT,
        {"first": hint},
        init_image=start(),
        mask_image=mask(),
        strength=strength,
        controlnet_conditioning_scale=0.9,
        scheduler=scheduler,
        seed=7,
        output_type="latent",
        **SHARED,
    ).images
    check_same(compiled, found, pipeline, latents)


@pytest.mark.parametrize("family", ["sd21"], indirect=True, scope="module")
@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_two_passes(wide: ControlNetPipeline, family: Family, upscaler: str) -> None:
    """diffusers has no such pipeline: text to image, the enlargement, and picture to picture one after the other."""
    large = 2 * SIDE
    (large_hint,) = hints(large, 1)
    small_hint = large_hint.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    first = family.reference("first")
    shared = {"generator": generator(7), "output_type": "latent" if upscaler == "latent" else "pil", **SHARED}
    start_from = first(PROMPT, image=small_hint, **shared).images
    if upscaler == "latent":
        start_from = torch.nn.functional.interpolate(start_from, size=(large // 8, large // 8), mode="bilinear")
    else:
        start_from = start_from[0].resize((large, large), Image.Resampling.LANCZOS)
    pipeline = reference(family, "Img2Img")
    latents = pipeline(
        PROMPT,
        image=start_from,
        control_image=large_hint,
        strength=0.7,
        controlnet_conditioning_scale=1.0,
        generator=generator(7),
        output_type="latent",
        **SHARED,
    ).images
    found = hires_fix(
        wide,
        PROMPT,
        {"first": large_hint},
        first_size=(SIDE, SIDE),
        width=large,
        height=large,
        strength=0.7,
        upscaler=upscaler,  # type: ignore[arg-type]
        seed=7,
        output_type="latent",
        **SHARED,
    ).images
    check_same(wide, found, pipeline, latents)
