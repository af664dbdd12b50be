"""How control acts, against diffusers where it can do the same, and against a loop in eager PyTorch where not.

The same for Stable Diffusion 1.5 and XL; ``sdxl`` is quick to build and has 7 residuals,
``sdxl_of_ten`` has the published number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity.eager import PROMPT, check_same, hints, relative
from parity.eager_control import EagerAdapter, EagerControl, denoise
from PIL import Image

from controlrt.runtime import ControlNetPipeline
from families import SHUFFLE, SIDE, Family

SHARED: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 5.0}
SHOWS = 0.01
"""Relative change of latents by what is tested: ten times the bound."""
SLOW = pytest.param("sdxl_of_ten", marks=pytest.mark.slow)

every_family = pytest.mark.parametrize("family", ["sd15", "sdxl", SLOW], indirect=True, scope="module")
with_all_kinds = pytest.mark.parametrize("family", ["sd15", SLOW], indirect=True, scope="module")
"""Those with a ControlNet that pools and two adapters."""


def drawn(compiled: ControlNetPipeline, image: Any, prompt: Any = PROMPT, **options: Any) -> NDArray[np.float32]:
    return compiled(prompt, image, seed=7, output_type="latent", **{**SHARED, **options}).images


def expected(reference: Any, pictures: list[Image.Image], **options: Any) -> torch.Tensor:
    return reference(
        PROMPT,
        image=pictures if len(pictures) > 1 else pictures[0],
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="latent",
        **{**SHARED, **options},
    ).images


def looped(reference: Any, controls: list[EagerControl], prompts: Any = (PROMPT,), **options: Any) -> Any:
    return denoise(reference, prompts, seed=7, steps=5, guidance_scale=5.0, side=SIDE, controls=controls, **options)


@every_family
@pytest.mark.parametrize("controls", [("first",), ("first", "second")])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_guess_mode(
    compiled: ControlNetPipeline, family: Family, controls: tuple[str, ...], guidance_scale: float
) -> None:
    pictures = hints(SIDE, len(controls))
    scales = [0.8, 1.2][: len(controls)]
    reference = family.reference(*controls)
    latents = expected(
        reference,
        pictures,
        guess_mode=True,
        guidance_scale=guidance_scale,
        controlnet_conditioning_scale=scales if len(scales) > 1 else scales[0],
    )
    image = dict(zip(controls, pictures, strict=True))
    shared = {"controlnet_conditioning_scale": scales, "guidance_scale": guidance_scale}
    found = drawn(compiled, image, guess_mode=True, **shared)
    check_same(compiled, found, reference, latents)
    assert relative(found, drawn(compiled, image, **shared)) > SHOWS


@with_all_kinds
def test_a_model_that_pools_acts_on_the_conditional_half(compiled: ControlNetPipeline, family: Family) -> None:
    pictures = hints(SIDE, 1)
    reference = family.reference(SHUFFLE)
    latents = expected(reference, pictures, controlnet_conditioning_scale=1.5)
    found = drawn(compiled, {SHUFFLE: pictures[0]}, controlnet_conditioning_scale=1.5)
    check_same(compiled, found, reference, latents)
    assert relative(found, drawn(compiled, None)) > SHOWS


@with_all_kinds
def test_guess_mode_of_a_model_that_pools(compiled: ControlNetPipeline, family: Family) -> None:
    """Its residuals have no scales that rise: guess mode changes nothing of it, here as in diffusers."""
    pictures = hints(SIDE, 1)
    reference = family.reference(SHUFFLE)
    latents = expected(reference, pictures, controlnet_conditioning_scale=1.5, guess_mode=True)
    found = drawn(compiled, {SHUFFLE: pictures[0]}, controlnet_conditioning_scale=1.5, guess_mode=True)
    check_same(compiled, found, reference, latents)


@with_all_kinds
def test_a_model_that_pools_beside_two_that_do_not(compiled: ControlNetPipeline, family: Family) -> None:
    names = ("first", SHUFFLE, "second")
    pictures = hints(SIDE, 3)
    reference = family.reference(*names)
    controls = [
        EagerControl(model=model, picture=picture, conditional=name == SHUFFLE)
        for name, model, picture in zip(names, reference.controlnet.nets, pictures, strict=True)
    ]
    found = drawn(compiled, dict(zip(names, pictures, strict=True)))
    check_same(compiled, found, reference, looped(reference, controls))


def soft(layers: int) -> torch.Tensor:
    """The first of thirteen weights."""
    return torch.tensor([[[0.825 ** (12 - i) for i in range(layers)]]])


def rising(layers: int) -> NDArray[np.float64]:
    return np.linspace(0.2, 1.4, layers)


CURVE = [1.2, 0.9, 0.0, 0.4, 0.7]
Said = dict[str, Any]
DIALECTS: dict[str, Callable[[int], tuple[Said, Said]]] = {
    "original guess mode": lambda layers: (
        {"guess_mode": "original", "controlnet_conditioning_scale": 1.1},
        {"scale": 1.1 * soft(layers), "conditional": True},
    ),
    "my prompt is more important": lambda layers: (
        {"control_mode": "My prompt is more important", "controlnet_conditioning_scale": 1.1},
        {"scale": 1.1 * soft(layers)},
    ),
    "ControlNet is more important": lambda layers: (
        {"control_mode": {"first": "ControlNet is more important"}},
        {"scale": soft(layers), "conditional": True},
    ),
    "balanced": lambda _: ({"control_mode": 0}, {}),
    "soft weights": lambda layers: ({"control_layer_weights": "soft"}, {"scale": soft(layers)}),
    "layer weights": lambda layers: (
        {"control_layer_weights": {"first": list(rising(layers))}, "controlnet_conditioning_scale": 0.9},
        {"scale": torch.tensor(0.9 * rising(layers)[None, None])},
    ),
    "a list over the steps": lambda _: (
        {"controlnet_conditioning_scale": {"first": CURVE}},
        {"scale": torch.tensor(CURVE)[:, None, None]},
    ),
    "a function of the step": lambda _: (
        {"controlnet_conditioning_scale": lambda done: 1.5 - done},
        {"scale": 1.5 - torch.arange(5)[:, None, None] / 5},
    ),
}
"""What a call says, and what that is in the loop, for a ControlNet with so many residuals."""


@every_family
@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_dialects(compiled: ControlNetPipeline, family: Family, dialect: str) -> None:
    (picture,) = hints(SIDE, 1)
    reference = family.reference("first")
    said, eager = DIALECTS[dialect](len(reference.controlnet.controlnet_down_blocks) + 1)
    found = drawn(compiled, {"first": picture}, **said)
    control = EagerControl(model=reference.controlnet, picture=picture, **eager)
    check_same(compiled, found, reference, looped(reference, [control]))
    plain = relative(found, drawn(compiled, {"first": picture}))
    assert (plain == 0) if dialect == "balanced" else (plain > SHOWS)


@every_family
def test_a_scale_for_every_picture_and_a_region(compiled: ControlNetPipeline, family: Family) -> None:
    (picture,) = hints(SIDE, 1)
    prompts = [PROMPT, "a blue circle"]
    region = np.zeros((SIDE, SIDE), np.float32)
    region[:, : SIDE // 2] = np.linspace(0, 1, SIDE // 2)
    reference = family.reference("first")
    control = EagerControl(
        model=reference.controlnet, picture=picture, scale=torch.tensor([[[0.5], [1.5]]]), region=region
    )
    found = drawn(
        compiled,
        {"first": picture},
        prompts,
        controlnet_conditioning_scale=np.array([0.5, 1.5]).reshape(1, 2, 1),
        control_region=region,
    )
    check_same(compiled, found, reference, looped(reference, [control], prompts))
    assert relative(found, drawn(compiled, {"first": picture}, prompts)) > SHOWS


@every_family
def test_two_controls_each_in_its_own_way(compiled: ControlNetPipeline, family: Family) -> None:
    """Mode, scale over the steps, layer weights and region are each control's own."""
    pictures = hints(SIDE, 2)
    left, right = np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.float32)
    left[:, : SIDE // 2], right[:, SIDE // 2 :] = 1, 1
    reference = family.reference("first", "second")
    first, second = reference.controlnet.nets
    layers = len(first.controlnet_down_blocks) + 1
    curve, weights = torch.tensor(CURVE)[:, None, None], torch.tensor(rising(layers)[None, None])
    controls = [
        EagerControl(model=first, picture=pictures[0], scale=curve * soft(layers), conditional=True, region=left),
        EagerControl(model=second, picture=pictures[1], scale=0.7 * weights, region=right),
    ]
    found = drawn(
        compiled,
        {"first": pictures[0], "second": pictures[1]},
        controlnet_conditioning_scale={"first": CURVE, "second": 0.7},
        control_mode=["ControlNet is more important", "Balanced"],
        control_layer_weights={"second": list(rising(layers))},
        control_region={"first": left, "second": right},
    )
    check_same(compiled, found, reference, looped(reference, controls))


def adapter_reference(family: Family, *names: str) -> Any:
    """diffusers' pipeline for T2I-Adapters."""
    adapters = [diffusers.T2IAdapter.from_pretrained(family.adapters[name]) for name in names]
    cls = getattr(diffusers, f"StableDiffusion{'XL' if family.name == 'sdxl' else ''}AdapterPipeline")
    several = diffusers.MultiAdapter(adapters) if len(adapters) > 1 else adapters[0]
    reference = cls.from_pretrained(family.model, adapter=several)
    reference.set_progress_bar_config(disable=True)
    return reference


SIZE = {"height": SIDE, "width": SIDE}


@every_family
def test_one_adapter(compiled: ControlNetPipeline, family: Family) -> None:
    """A random one does little, so its scale is a large one."""
    pictures = hints(SIDE, 1)
    reference = adapter_reference(family, "depth")
    latents = expected(reference, pictures, adapter_conditioning_scale=8.0, **SIZE)
    found = drawn(compiled, {"depth": pictures[0]}, controlnet_conditioning_scale=8.0)
    check_same(compiled, found, reference, latents)
    assert relative(found, drawn(compiled, None)) > SHOWS
    assert relative(found, drawn(compiled, {"depth": pictures[0]}, controlnet_conditioning_scale=4.0)) > SHOWS


@pytest.mark.parametrize("family", ["sdxl"], indirect=True, scope="module")
def test_an_adapter_for_some_of_the_steps(compiled: ControlNetPipeline, family: Family) -> None:
    """diffusers has it for XL alone; in the loop of two adapters and a ControlNet, an adapter stops early too."""
    pictures = hints(SIDE, 1)
    reference = adapter_reference(family, "depth")
    latents = expected(reference, pictures, adapter_conditioning_scale=2.0, adapter_conditioning_factor=0.2, **SIZE)
    shared = {"controlnet_conditioning_scale": 2.0}
    found = drawn(compiled, {"depth": pictures[0]}, control_guidance_end=0.2, **shared)
    check_same(compiled, found, reference, latents)
    assert relative(found, drawn(compiled, {"depth": pictures[0]}, **shared)) > SHOWS
    assert relative(found, drawn(compiled, None)) > SHOWS


@with_all_kinds
def test_two_adapters(compiled: ControlNetPipeline, family: Family) -> None:
    depth, sketch = hints(SIDE, 2)
    reference = adapter_reference(family, "depth", "sketch")
    latents = expected(reference, [depth, sketch.convert("L")], adapter_conditioning_scale=[8.0, 5.0], **SIZE)
    both = {"depth": depth, "sketch": sketch}
    found = drawn(compiled, both, controlnet_conditioning_scale=[8.0, 5.0])
    check_same(compiled, found, reference, latents)
    assert relative(found, drawn(compiled, {"depth": depth}, controlnet_conditioning_scale=8.0)) > SHOWS
    assert relative(found, drawn(compiled, {"sketch": sketch}, controlnet_conditioning_scale=5.0)) > SHOWS
    assert relative(found, drawn(compiled, both, controlnet_conditioning_scale=[5.0, 8.0])) > SHOWS


@with_all_kinds
def test_two_adapters_and_a_controlnet(compiled: ControlNetPipeline, family: Family) -> None:
    pictures = hints(SIDE, 3)
    reference = family.reference("first")
    depth, sketch = (diffusers.T2IAdapter.from_pretrained(family.adapters[name]) for name in ("depth", "sketch"))
    latents = looped(
        reference,
        [EagerControl(model=reference.controlnet, picture=pictures[0])],
        adapters=[
            EagerAdapter(model=depth, picture=pictures[1], scale=8.0),
            EagerAdapter(model=sketch, picture=pictures[2], scale=8.0, until=0.4),
        ],
    )
    image = dict(zip(("first", "depth", "sketch"), pictures, strict=True))
    scales = {"controlnet_conditioning_scale": [1.0, 8.0, 8.0]}
    found = drawn(compiled, image, control_guidance_end=[1.0, 1.0, 0.4], **scales)
    check_same(compiled, found, reference, latents)
    # late steps change little, so the bound of latents alone would not tell whether it stopped
    assert relative(found, drawn(compiled, image, **scales)) > 100 * relative(found, np.asarray(latents))
    for left_out in image:
        others = {name: picture for name, picture in image.items() if name != left_out}
        given = {"control_guidance_end": {name: 0.4 if name == "sketch" else 1.0 for name in others}}
        given |= {"controlnet_conditioning_scale": {name: 1.0 if name == "first" else 8.0 for name in others}}
        assert relative(found, drawn(compiled, others, **given)) > SHOWS, left_out


@every_family
@pytest.mark.parametrize("guidance_rescale", [0.3, 1.0])
def test_guidance_rescale(compiled: ControlNetPipeline, family: Family, guidance_rescale: float) -> None:
    reference = family.reference()
    latents = reference(
        PROMPT,
        generator=torch.Generator("cpu").manual_seed(7),
        guidance_rescale=guidance_rescale,
        output_type="latent",
        **SIZE,
        **SHARED,
    ).images
    check_same(compiled, drawn(compiled, None, guidance_rescale=guidance_rescale), reference, latents)
