"""How control acts, against diffusers where it can do the same, and against a loop in eager PyTorch where not."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from parity.eager import PROMPT, hints, relative
from parity.eager_control import EagerAdapter, EagerControl, denoise

from controlrt.runtime import ControlNetPipeline
from families import SHUFFLE, SIDE, Family

BOUND = 1e-3
SHARED: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 5.0}
LAYERS = 13

pytestmark = pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")


def drawn(compiled: ControlNetPipeline, image: Any, prompt: Any = PROMPT, **options: Any) -> Any:
    return compiled(prompt, image, seed=7, output_type="latent", **{**SHARED, **options}).images


def expected(family: Family, controls: tuple[str, ...], pictures: list[Any], **options: Any) -> Any:
    single = len(controls) == 1
    return (
        family.reference(*controls)(
            PROMPT,
            image=pictures[0] if single else pictures,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="latent",
            **{**SHARED, **options},
        )
        .images.detach()
        .numpy()
    )


@pytest.mark.parametrize("controls", [("first",), ("first", "second")])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_guess_mode(
    compiled: ControlNetPipeline, family: Family, controls: tuple[str, ...], guidance_scale: float
) -> None:
    pictures = hints(SIDE, len(controls))
    options = {"guess_mode": True, "guidance_scale": guidance_scale}
    scales = [0.8, 1.2][: len(controls)]
    reference = expected(
        family, controls, pictures, controlnet_conditioning_scale=scales if len(scales) > 1 else scales[0], **options
    )
    image = dict(zip(controls, pictures, strict=True))
    found = drawn(compiled, image, controlnet_conditioning_scale=scales, **options)
    assert relative(found, reference) < BOUND
    without = drawn(compiled, image, controlnet_conditioning_scale=scales, guidance_scale=guidance_scale)
    assert relative(found, without) > 0.01


def test_a_model_that_pools_acts_on_the_conditional_half(compiled: ControlNetPipeline, family: Family) -> None:
    pictures = hints(SIDE, 1)
    reference = expected(family, (SHUFFLE,), pictures, controlnet_conditioning_scale=1.5)
    found = drawn(compiled, {SHUFFLE: pictures[0]}, controlnet_conditioning_scale=1.5)
    assert relative(found, reference) < BOUND


def test_a_model_that_pools_beside_one_that_does_not(compiled: ControlNetPipeline, family: Family) -> None:
    pictures = hints(SIDE, 2)
    reference = family.reference("first", SHUFFLE)
    first, shuffle = reference.controlnet.nets
    latents = denoise(
        reference,
        [PROMPT],
        seed=7,
        steps=5,
        guidance_scale=5.0,
        side=SIDE,
        controls=[
            EagerControl(model=first, picture=pictures[0]),
            EagerControl(model=shuffle, picture=pictures[1], conditional=True),
        ],
    )
    found = drawn(compiled, {"first": pictures[0], SHUFFLE: pictures[1]})
    assert relative(found, latents) < BOUND


SOFT = torch.tensor([[[0.825 ** (12 - i) for i in range(LAYERS)]]])
RISING = np.linspace(0.2, 1.4, LAYERS)
CURVE = [1.2, 0.9, 0.0, 0.4, 0.7]
DIALECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "original guess mode": (
        {"guess_mode": "original", "controlnet_conditioning_scale": 1.1},
        {"scale": 1.1 * SOFT, "conditional": True},
    ),
    "my prompt is more important": (
        {"control_mode": "My prompt is more important", "controlnet_conditioning_scale": 1.1},
        {"scale": 1.1 * SOFT},
    ),
    "ControlNet is more important": (
        {"control_mode": {"first": "ControlNet is more important"}},
        {"scale": SOFT, "conditional": True},
    ),
    "balanced": ({"control_mode": 0}, {}),
    "soft weights": ({"control_layer_weights": "soft"}, {"scale": SOFT}),
    "layer weights": (
        {"control_layer_weights": {"first": list(RISING)}, "controlnet_conditioning_scale": 0.9},
        {"scale": torch.tensor(0.9 * RISING[None, None])},
    ),
    "a list over the steps": (
        {"controlnet_conditioning_scale": {"first": CURVE}},
        {"scale": torch.tensor(CURVE)[:, None, None]},
    ),
    "a function of the step": (
        {"controlnet_conditioning_scale": lambda done: 1.5 - done},
        {"scale": 1.5 - torch.arange(5)[:, None, None] / 5},
    ),
}


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_dialects(compiled: ControlNetPipeline, family: Family, dialect: str) -> None:
    options, eager = DIALECTS[dialect]
    (picture,) = hints(SIDE, 1)
    reference = family.reference("first")
    control = EagerControl(model=reference.controlnet, picture=picture, **eager)
    latents = denoise(reference, [PROMPT], seed=7, steps=5, guidance_scale=5.0, side=SIDE, controls=[control])
    assert relative(drawn(compiled, {"first": picture}, **options), latents) < BOUND


def test_a_scale_for_every_picture_and_a_region(compiled: ControlNetPipeline, family: Family) -> None:
    (picture,) = hints(SIDE, 1)
    prompts = [PROMPT, "a blue circle"]
    region = np.zeros((SIDE, SIDE), np.float32)
    region[:, : SIDE // 2] = np.linspace(0, 1, SIDE // 2)
    reference = family.reference("first")
    control = EagerControl(
        model=reference.controlnet,
        picture=picture,
        scale=torch.tensor([[[0.5], [1.5]]]),
        region=region,
    )
    latents = denoise(reference, prompts, seed=7, steps=5, guidance_scale=5.0, side=SIDE, controls=[control])
    found = drawn(
        compiled,
        {"first": picture},
        prompts,
        controlnet_conditioning_scale=np.array([0.5, 1.5]).reshape(1, 2, 1),
        control_region=region,
    )
    assert relative(found, latents) < BOUND
    assert relative(found, drawn(compiled, {"first": picture}, prompts)) > 0.01


@pytest.mark.parametrize("scale", [0.7, 1.0])
def test_one_adapter(compiled: ControlNetPipeline, family: Family, scale: float) -> None:
    (picture,) = hints(SIDE, 1)
    adapter = diffusers.T2IAdapter.from_pretrained(family.adapters["depth"])
    reference = diffusers.StableDiffusionAdapterPipeline.from_pretrained(family.model, adapter=adapter)
    reference.set_progress_bar_config(disable=True)
    latents = reference(
        PROMPT,
        image=picture,
        generator=torch.Generator("cpu").manual_seed(7),
        adapter_conditioning_scale=scale,
        height=SIDE,
        width=SIDE,
        output_type="latent",
        **SHARED,
    ).images.numpy()
    found = drawn(compiled, {"depth": picture}, controlnet_conditioning_scale=scale)
    assert relative(found, latents) < BOUND
    assert relative(found, drawn(compiled, None)) > 1e-3


def test_two_adapters(compiled: ControlNetPipeline, family: Family) -> None:
    depth, sketch = hints(SIDE, 2)
    adapters = [diffusers.T2IAdapter.from_pretrained(family.adapters[name]) for name in ("depth", "sketch")]
    reference = diffusers.StableDiffusionAdapterPipeline.from_pretrained(family.model, adapter=adapters)
    reference.set_progress_bar_config(disable=True)
    latents = reference(
        PROMPT,
        image=[depth, sketch.convert("L")],
        generator=torch.Generator("cpu").manual_seed(7),
        adapter_conditioning_scale=[0.8, 0.5],
        height=SIDE,
        width=SIDE,
        output_type="latent",
        **SHARED,
    ).images.numpy()
    found = drawn(compiled, {"depth": depth, "sketch": sketch}, controlnet_conditioning_scale=[0.8, 0.5])
    assert relative(found, latents) < BOUND
    assert relative(found, drawn(compiled, {"depth": depth}, controlnet_conditioning_scale=0.8)) > 1e-3


def test_two_adapters_and_a_controlnet(compiled: ControlNetPipeline, family: Family) -> None:
    pictures = hints(SIDE, 3)
    reference = family.reference("first")
    depth, sketch = (diffusers.T2IAdapter.from_pretrained(family.adapters[name]) for name in ("depth", "sketch"))
    latents = denoise(
        reference,
        [PROMPT],
        seed=7,
        steps=5,
        guidance_scale=5.0,
        side=SIDE,
        controls=[EagerControl(model=reference.controlnet, picture=pictures[0])],
        adapters=[
            EagerAdapter(model=depth, picture=pictures[1], scale=0.8),
            EagerAdapter(model=sketch, picture=pictures[2], scale=0.5, until=0.4),
        ],
    )
    found = drawn(
        compiled,
        {"first": pictures[0], "depth": pictures[1], "sketch": pictures[2]},
        controlnet_conditioning_scale=[1.0, 0.8, 0.5],
        control_guidance_end=[1.0, 1.0, 0.4],
    )
    assert relative(found, latents) < BOUND


@pytest.mark.parametrize("guidance_rescale", [0.3, 1.0])
def test_guidance_rescale(compiled: ControlNetPipeline, family: Family, guidance_rescale: float) -> None:
    reference = family.reference()
    latents = reference(
        PROMPT,
        generator=torch.Generator("cpu").manual_seed(7),
        height=SIDE,
        width=SIDE,
        guidance_rescale=guidance_rescale,
        output_type="latent",
        **SHARED,
    ).images.numpy()
    assert relative(drawn(compiled, None, guidance_rescale=guidance_rescale), latents) < BOUND
