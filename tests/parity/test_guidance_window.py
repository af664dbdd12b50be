"""Guidance in a window of the steps, against eager PyTorch.

Where guidance ends on the way, diffusers' own pipelines do it, with their documented callback for dynamic
classifier-free guidance (https://huggingface.co/docs/diffusers/using-diffusers/callback). Where it begins on the way,
they cannot, so a plain loop over their models and scheduler does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity.eager import PROMPT, PSNR_BOUND, check_same, decoded, demo_reference, hints, psnr
from PIL import Image

from controlrt.demo.scenes import sample_scene
from controlrt.runtime import ControlNetPipeline
from families import CONTROLS, SIDE, Family

NEGATIVE = "a green moon"
BY_ROW = ("prompt_embeds", "image", "add_text_embeds", "add_time_ids")
every_family = pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"], indirect=True, scope="module")


def ends_after(guided_steps: int) -> Callable[..., dict[str, Any]]:
    """A callback for diffusers that turns guidance off: the conditional half of everything is kept."""

    def callback(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 != guided_steps:
            return {}
        pipeline._guidance_scale = 0.0
        return {name: _half(value) for name, value in tensors.items()}

    return callback


def _half(value: Any) -> Any:
    return [_half(each) for each in value] if isinstance(value, list) else value.chunk(2)[-1]


def eager(reference: Any, guided_steps: int, count: int, **options: Any) -> NDArray[np.float32]:
    names = [name for name in BY_ROW if name in reference._callback_tensor_inputs]
    if options.get("guess_mode"):
        names.remove("image")  # diffusers does not repeat it for the unconditional rows
    switched = {"callback_on_step_end": ends_after(guided_steps), "callback_on_step_end_tensor_inputs": names}
    images = reference(
        num_inference_steps=count,
        output_type="latent",
        **options,
        **(switched if guided_steps < count else {}),
    ).images
    return np.asarray(images)


@every_family
@pytest.mark.parametrize(("controls", "end", "guided_steps"), [(CONTROLS[:1], 0.5, 3), (CONTROLS, 0.7, 4)])
def test_guidance_that_ends(
    compiled: ControlNetPipeline, family: Family, controls: tuple[str, ...], end: float, guided_steps: int
) -> None:
    """The windows of ControlNets and that of guidance end at different steps."""
    pictures = hints(SIDE, len(controls))
    shared = {"negative_prompt": NEGATIVE, "guidance_scale": 6.0, "control_guidance_end": 0.9}
    reference = family.reference(*controls)
    expected = eager(
        reference,
        guided_steps,
        count=6,
        prompt=PROMPT,
        image=pictures if len(pictures) > 1 else pictures[0],
        generator=torch.Generator().manual_seed(4),
        **shared,
    )
    found = compiled(
        PROMPT,
        dict(zip(controls, pictures, strict=True)),
        seed=4,
        num_inference_steps=6,
        guidance_end=end,
        output_type="latent",
        **shared,
    ).images
    check_same(compiled, found, reference, expected)


@pytest.mark.parametrize("family", ["sd15", "sdxl"], indirect=True, scope="module")
def test_several_pictures(compiled: ControlNetPipeline, family: Family) -> None:
    """Two prompts, two pictures each: the conditional rows of every picture are kept, and in order."""
    pictures = hints(SIDE, 2)
    prompts = [PROMPT, "a black circle on an orange background"]
    shared = {"num_images_per_prompt": 2, "guidance_scale": 6.0, "negative_prompt": [NEGATIVE, "a red ring"]}
    reference = family.reference("first")
    expected = eager(
        reference,
        2,
        count=4,
        prompt=prompts,
        image=pictures,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)],
        **shared,
    )
    found = compiled(
        prompts,
        {"first": pictures},
        seed=[1, 2, 3, 4],
        num_inference_steps=4,
        guidance_end=0.5,
        output_type="latent",
        **shared,
    ).images
    check_same(compiled, found, reference, expected)


@pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")
def test_guess_mode(compiled: ControlNetPipeline, family: Family) -> None:
    """Guess mode leaves the unconditional rows without control; without them it is a scale by layer."""
    (hint,) = hints(SIDE, 1)
    shared = {"guidance_scale": 5.0, "guess_mode": True}
    reference = family.reference("first")
    expected = eager(
        reference,
        2,
        count=4,
        prompt=PROMPT,
        image=hint,
        generator=torch.Generator().manual_seed(5),
        **shared,
    )
    found = compiled(
        PROMPT, {"first": hint}, seed=5, num_inference_steps=4, guidance_end=0.5, output_type="latent", **shared
    ).images
    check_same(compiled, found, reference, expected)


def plain_loop(reference: Any, hint: Image.Image | None, guided: list[bool], seed: int) -> NDArray[np.float32]:
    """Denoises over diffusers' models and scheduler, rows by themselves: no batch of two, as ours has."""
    positive, negative = reference.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    scheduler = reference.scheduler
    scheduler.set_timesteps(len(guided))
    side = reference.unet.config.sample_size
    latents = (
        torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    )
    condition = None
    if hint is not None:
        condition = torch.from_numpy(np.asarray(hint)).permute(2, 0, 1)[None].float() / 255

    def predict(embeds: torch.Tensor, model_input: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        residuals = {}
        if condition is not None:
            down, middle = reference.controlnet(model_input, timestep, embeds, condition, 1.0, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return reference.unet(model_input, timestep, embeds, return_dict=False, **residuals)[0]

    for timestep, has_guidance in zip(scheduler.timesteps, guided, strict=True):
        model_input = scheduler.scale_model_input(latents, timestep)
        output = predict(positive, model_input, timestep)
        if has_guidance:
            without = predict(negative, model_input, timestep)
            output = without + 6.0 * (output - without)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents.numpy()


WINDOWS = {
    (0.0, 1.0): [True] * 5,
    (0.0, 0.5): [True, True, False, False, False],
    (0.4, 1.0): [False, False, True, True, True],
    (0.2, 0.8): [False, True, True, True, False],
    (0.5, 0.7): [False] * 5,
}


@pytest.mark.parametrize("family", ["sd15", "sd21"], indirect=True, scope="module")
@pytest.mark.parametrize("window", WINDOWS)
def test_any_window(compiled: ControlNetPipeline, family: Family, window: tuple[float, float]) -> None:
    (hint,) = hints(SIDE, 1)
    reference = family.reference("first")
    expected = plain_loop(reference, hint, WINDOWS[window], seed=8)
    found = compiled(
        PROMPT,
        {"first": hint},
        negative_prompt=NEGATIVE,
        guidance_scale=6.0,
        guidance_start=window[0],
        guidance_end=window[1],
        num_inference_steps=5,
        seed=8,
        output_type="latent",
    ).images
    check_same(compiled, found, reference, expected)


def test_half_the_steps_of_the_demo_model(demo: ControlNetPipeline) -> None:
    scene = sample_scene(np.random.default_rng(24))
    hint = Image.fromarray(scene.control("mask", 512))
    reference = demo_reference("mask")
    expected = eager(
        reference, 2, count=4, prompt=PROMPT, image=hint, generator=torch.Generator().manual_seed(6), guidance_scale=7.5
    )
    shared = {"num_inference_steps": 4, "seed": 6, "guidance_scale": 7.5}
    found = demo(PROMPT, {"mask": hint}, guidance_end=0.5, output_type="np", **shared).images
    assert psnr(found, decoded(reference, expected)) > PSNR_BOUND
    whole = demo(PROMPT, {"mask": hint}, output_type="np", **shared).images
    assert psnr(found, whole) < 40  # the window shows
