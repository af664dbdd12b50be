"""Latent consistency models, whose UNet is told its guidance scale, against diffusers' own ControlNet pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity.eager import LATENTS_BOUND, PROMPT, check_same, hints, relative

from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.errors import ParameterError
from controlrt.runtime.guidance_embedding import embed_guidance_scale
from controlrt.runtime.stepping import Staged, Stepper
from families import SIDE, Family

STEPS = 4
SCALES = (0.0, 1.0, 4.0, 8.5)

pytestmark = pytest.mark.parametrize("family", ["consistency"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def reference(family: Family) -> Any:
    return family.reference("first")


def eager(reference: Any, guidance_scale: float, **options: Any) -> NDArray[np.float32]:
    (hint,) = hints(SIDE, 1)
    generator = torch.Generator().manual_seed(7)
    given = {"guidance_scale": guidance_scale, "num_inference_steps": STEPS, "output_type": "latent", **options}
    return np.asarray(reference(PROMPT, image=hint, generator=generator, **given).images)


def call(guidance_scale: float, **options: Any) -> dict[str, Any]:
    given = {"guidance_scale": guidance_scale, "num_inference_steps": STEPS, "seed": 7, **options}
    return {"prompt": PROMPT, "image": {"first": hints(SIDE, 1)[0]}, **given}


@pytest.mark.parametrize("guidance_scale", SCALES)
def test_same_picture(compiled: ControlNetPipeline, reference: Any, guidance_scale: float) -> None:
    """With the checkpoint's own sampler. diffusers takes a negative prompt and does not read it."""
    expected = eager(reference, guidance_scale, negative_prompt="a green moon")
    found = compiled(**call(guidance_scale, negative_prompt="a green moon"), output_type="latent").images
    check_same(compiled, found, reference, expected)


def test_another_scale_is_another_picture_and_no_other_plan(compiled: ControlNetPipeline) -> None:
    """The scale is bytes in the buffers of a plan, and a plan that is there is what a GPU has captured."""
    first = compiled(**call(SCALES[0]), output_type="latent").images
    plans = set(compiled._bound)
    for guidance_scale in SCALES[1:]:
        found = compiled(**call(guidance_scale), output_type="latent").images
        assert relative(found, first) > 20 * LATENTS_BOUND
    assert set(compiled._bound) == plans


def test_scales_beside_each_other(compiled: ControlNetPipeline, reference: Any) -> None:
    """Requests of different guidance take their steps together; the last joins when the others are under way."""
    drawings = []
    for guidance_scale in SCALES[1:]:
        prepared = compiled.prepare(**call(guidance_scale))
        drawings.append(Staged(compiled.plan(prepared.layout), prepared))
        compiled.fill(prepared, drawings[-1].plan, drawings[-1].buffers)
    stepper = Stepper(compiled.bundle, compiled._executor)
    stepper.step(drawings[:2])
    while waiting := [drawing for drawing in drawings if not drawing.done]:
        stepper.step(waiting)
    stepper.close()
    for guidance_scale, drawing in zip(SCALES[1:], drawings, strict=True):
        assert relative(drawing.latents, eager(reference, guidance_scale)) < LATENTS_BOUND


def test_a_new_prompt_leaves_what_guidance_decides(
    compiled: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    run = compiled._executor.run
    monkeypatch.setattr(compiled._executor, "run", lambda name, inputs: ran.append(name) or run(name, inputs))
    latents = {"output_type": "latent"}
    compiled(**call(6.0), **latents)
    ran.clear()
    compiled(**{**call(6.0), "prompt": "a black ring"}, **latents)
    assert sorted(ran) == ["controlnet.first.prompt", "text_encoder", "unet.prompt"]
    ran.clear()
    compiled(**call(6.5), **latents)
    assert ran == ["unet.prompt_timestep"]


@pytest.mark.parametrize("window", [{"guidance_start": 0.2}, {"guidance_end": 0.8}])
def test_guidance_in_a_window_is_refused(compiled: ControlNetPipeline, window: dict[str, float]) -> None:
    (name,) = window
    with pytest.raises(ParameterError, match=rf"^{name} is 0\.\d, but must be \d: a consistency model"):
        compiled.prepare(**call(4.0), **window)


@pytest.mark.parametrize("channels", [256, 48, 33])
def test_the_embedding(reference: Any, channels: int) -> None:
    """Rounding of angles that go to thousands is what they differ by."""
    for guidance_scale in np.linspace(0, 15, 31):
        scale = torch.tensor([float(guidance_scale) - 1])
        expected = reference.get_guidance_scale_embedding(scale, embedding_dim=channels)[0].numpy()
        np.testing.assert_allclose(embed_guidance_scale(float(guidance_scale), channels), expected, atol=2e-3)
