"""ControlNet Union against diffusers' own pipelines: one type, several at once, several unions, other tasks.

diffusers' guess mode cannot be compared: it tells a union the types of both halves and runs it on one, and fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from parity.eager import PROMPT, check_same, hints, relative
from PIL import Image

from controlrt.runtime import ControlNetPipeline
from families import SIDE, Family

SHARED: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0}
DEPTH, CANNY, TILE = 1, 3, 6
ONE = {"union.depth": DEPTH}
TWO = {**ONE, "union.canny": CANNY}
THREE = {**TWO, "union.tile": TILE}

pytestmark = pytest.mark.parametrize("family", ["union"], indirect=True, scope="module")


def reference(family: Family, *unions: str, task: str = "") -> Any:
    """diffusers' pipeline for ControlNet Unions."""
    loaded = [diffusers.ControlNetUnionModel.from_pretrained(family.controlnets[name]) for name in unions]
    cls = getattr(diffusers, f"StableDiffusionXLControlNetUnion{task}Pipeline")
    pipeline = cls.from_pretrained(family.model, controlnet=loaded if len(loaded) > 1 else loaded[0])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


def expected(pipeline: Any, pictures: list[Any], types: list[int], **options: Any) -> Any:
    generator = torch.Generator("cpu").manual_seed(7)
    given = {"control_image": pictures, "control_mode": types, "generator": generator, "output_type": "latent"}
    return np.asarray(pipeline(**{"prompt": PROMPT, **SHARED, **given, **options}).images)


def drawn(compiled: ControlNetPipeline, image: Any, **options: Any) -> Any:
    return compiled(image=image, seed=7, **{"prompt": PROMPT, "output_type": "latent", **SHARED, **options}).images


def named(names: Any, pictures: list[Any]) -> dict[str, Any]:
    return dict(zip(names, pictures, strict=True))


@pytest.mark.parametrize("types", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_same_picture(
    compiled: ControlNetPipeline, family: Family, types: Mapping[str, int], scale: float, guidance_scale: float
) -> None:
    pictures = hints(SIDE, len(types))
    options = {"controlnet_conditioning_scale": scale, "guidance_scale": guidance_scale}
    pipeline = reference(family, "union")
    latents = expected(pipeline, pictures, list(types.values()), **options)
    found = drawn(compiled, named(types, pictures), **options)
    check_same(compiled, found, pipeline, latents)
    assert relative(found, drawn(compiled, None, **options)) > 0.01


def test_what_depends_on_the_control_picture_alone_is_not_in_the_step(compiled: ControlNetPipeline) -> None:
    """The transformer runs once per control picture, and a step is that of an ordinary ControlNet."""
    stages = {program.name: program for program in compiled.bundle.manifest.programs}
    reads = {name: {spec.name for spec in program.inputs} for name, program in stages.items()}
    assert reads["controlnet.union.hint"] == {"hint", "hint_type", "hint_scale"}
    assert "control_types" in reads["controlnet.union.prompt_timestep"]
    assert reads["controlnet.union.step"] == reads["controlnet.first.step"]
    assert stages["controlnet.union.step"].cost == stages["controlnet.first.step"].cost


def test_a_scale_for_each_type(compiled: ControlNetPipeline, family: Family) -> None:
    """Of types beside each other diffusers scales the features, not the residuals; one may be 0."""
    pictures = hints(SIDE, 3)
    pipeline = reference(family, "union")
    for scales in ([0.4, 1.3, 0.9], [0.7, 0.0, 0.0]):
        options = {"controlnet_conditioning_scale": scales}
        latents = expected(pipeline, pictures, list(THREE.values()), **options)
        check_same(compiled, drawn(compiled, named(THREE, pictures), **options), pipeline, latents)


def test_another_type_is_another_picture_and_no_other_plan(compiled: ControlNetPipeline, family: Family) -> None:
    """What the picture shows is bytes in the buffers of a plan."""
    pictures = hints(SIDE, 1)
    depth = drawn(compiled, {"union.depth": pictures[0]})
    plans = set(compiled._bound)
    normal = drawn(compiled, {"union.normal": pictures[0]})
    assert set(compiled._bound) == plans
    pipeline = reference(family, "union")
    check_same(compiled, normal, pipeline, expected(pipeline, pictures, [4]))
    assert relative(normal, depth) > 0.001


def test_windows_of_two_types(compiled: ControlNetPipeline, family: Family) -> None:
    pictures = hints(SIDE, 2)
    options = {
        "num_inference_steps": 5,
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.5, 1.0],
        "controlnet_conditioning_scale": [0.8, 1.2],
    }
    pipeline = reference(family, "union")
    latents = expected(pipeline, pictures, list(TWO.values()), **options)
    check_same(compiled, drawn(compiled, named(TWO, pictures), **options), pipeline, latents)


def test_outside_all_windows_it_is_off(compiled: ControlNetPipeline) -> None:
    """diffusers runs a union of two types all the same, without control pictures, and adds what it gives."""
    image = named(TWO, hints(SIDE, 2))
    whole = drawn(compiled, image, control_guidance_end=0.2, num_inference_steps=4)
    assert relative(whole, drawn(compiled, None, num_inference_steps=4)) == 0


def test_several_unions(compiled: ControlNetPipeline, family: Family) -> None:
    """diffusers gives each one type; the types of the second one have numbers for names."""
    pictures = hints(SIDE, 2)
    options = {"controlnet_conditioning_scale": [0.7, 1.2]}
    pipeline = reference(family, "union", "other")
    latents = expected(pipeline, pictures, [CANNY, 4], **options)
    found = drawn(compiled, named(("union.canny", "other.4"), pictures), **options)
    check_same(compiled, found, pipeline, latents)


def test_beside_an_ordinary_controlnet(compiled: ControlNetPipeline, family: Family) -> None:
    """Residuals add up: one of either at scale 0 is the other by itself."""
    pictures = hints(SIDE, 2)
    image = named(("first", "union.depth"), pictures)
    pipeline = reference(family, "union")
    latents = expected(pipeline, pictures[1:], [DEPTH])
    check_same(compiled, drawn(compiled, image, controlnet_conditioning_scale=[0, 1]), pipeline, latents)
    generator = torch.Generator().manual_seed(7)
    plain = family.reference("first")(
        PROMPT, image=pictures[0], generator=generator, output_type="latent", **SHARED
    ).images.numpy()
    check_same(compiled, drawn(compiled, image, controlnet_conditioning_scale=[1.0, 0.0]), pipeline, plain)
    both = drawn(compiled, image)
    assert min(relative(both, latents), relative(both, plain)) > 0.001


@pytest.mark.parametrize("types", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_guess_mode(
    compiled: ControlNetPipeline, family: Family, types: Mapping[str, int], guidance_scale: float
) -> None:
    pipeline = reference(family, "union")
    forward = pipeline.controlnet.forward

    def of_its_rows(sample: Any, *arguments: Any, control_type: Any, **others: Any) -> Any:
        return forward(sample, *arguments, control_type=control_type[: len(sample)], **others)

    pipeline.controlnet.forward = of_its_rows
    pictures = hints(SIDE, len(types))
    options = {"guess_mode": True, "guidance_scale": guidance_scale, "controlnet_conditioning_scale": 0.9}
    latents = expected(pipeline, pictures, list(types.values()), **options)
    check_same(compiled, drawn(compiled, named(types, pictures), **options), pipeline, latents)


def test_a_region(compiled: ControlNetPipeline) -> None:
    """Of the union as a whole: black is no control at all, white what it is without a region."""
    image = named(TWO, hints(SIDE, 2))
    black, white = (np.full((SIDE, SIDE), level, np.uint8) for level in (0, 255))
    assert relative(drawn(compiled, image, control_region={"union": black}), drawn(compiled, None)) < 1e-6
    assert relative(drawn(compiled, image, control_region=white), drawn(compiled, image)) < 1e-6


def test_several_pictures(compiled: ControlNetPipeline, family: Family) -> None:
    """Pictures of one control picture; of several, diffusers' attention over the batch would mix them."""
    pictures = hints(SIDE, 2)
    options = {"num_images_per_prompt": 2, "controlnet_conditioning_scale": 0.8}
    pipeline = reference(family, "union")
    latents = expected(pipeline, pictures, list(TWO.values()), **options)
    check_same(compiled, drawn(compiled, named(TWO, pictures), **options), pipeline, latents)


def test_prompts_with_control_pictures_of_their_own(compiled: ControlNetPipeline) -> None:
    """Each as it is by itself."""
    pictures, prompts = hints(SIDE, 2), [PROMPT, "a black circle"]
    latents = np.random.default_rng(3).standard_normal((2, 4, SIDE // 8, SIDE // 8), np.float32)
    both = drawn(compiled, {"union.depth": pictures}, prompt=prompts, latents=latents)
    for number in range(2):
        image = {"union.depth": pictures[number]}
        alone = drawn(compiled, image, prompt=prompts[number], latents=latents[number : number + 1])
        assert relative(both[number : number + 1], alone) < 1e-5


def test_picture_to_picture_and_inpainting(compiled: ControlNetPipeline, family: Family) -> None:
    pictures = hints(SIDE, 1)
    rng = np.random.default_rng(5)
    start = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[40:100, 30:90] = 255
    for task, given in (("Img2Img", {}), ("Inpaint", {"mask_image": Image.fromarray(mask)})):
        options = {"strength": 0.75, "controlnet_conditioning_scale": 0.8, **given}
        pipeline = reference(family, "union", task=task)
        latents = expected(pipeline, pictures, [DEPTH], image=start, **options)
        found = drawn(compiled, {"union.depth": pictures[0]}, init_image=start, **options)
        check_same(compiled, found, pipeline, latents)
