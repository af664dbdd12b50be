"""IP-Adapters against diffusers' own ControlNet pipelines after ``load_ip_adapter``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ip_adapters import ip_adapter_tensors, photo, save_image_encoder, save_ip_adapter
from parity.eager import LATENTS_BOUND, PROMPT, PSNR_BOUND, check_same, decoded, hints, psnr, relative
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.commands import main
from controlrt.runtime.conditioning import Conditioner
from controlrt.runtime.profile import ShapeProfile
from families import SIDE, Family

SHARED: dict[str, Any] = {"negative_prompt": "a green moon", "num_inference_steps": 4}
ADAPTERS = {"shallow": ("plain", "full"), "shallow_xl": ("plus",)}

every_family = pytest.mark.parametrize("family", list(ADAPTERS), indirect=True, scope="module")
sd15 = pytest.mark.parametrize("family", ["shallow"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def tensors(family: Family) -> dict[str, Any]:
    """Of each adapter of the family's bundle."""
    unet = family.reference().unet
    kinds = ADAPTERS["shallow_xl" if family.name == "sdxl" else "shallow"]
    return {kind: ip_adapter_tensors(unet, kind) for kind in kinds}


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_image_encoder(tmp_path_factory.mktemp("adapters") / "image_encoder")


@pytest.fixture(scope="module")
def prompted(
    family: Family, tensors: dict[str, Any], image_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlNetPipeline]:
    """The family with one ControlNet and its IP-Adapters; one fused, the other for OpenVINO."""
    output = tmp_path_factory.mktemp("bundles") / family.name
    xl = family.name == "sdxl"
    if xl:
        pytest.importorskip("openvino")
    adapters = {
        kind: str(save_ip_adapter(image_encoder.parent / f"{kind}.safetensors", own)) for kind, own in tensors.items()
    }
    options = BuildOptions(
        model=str(family.model),
        controlnets={"first": str(family.controlnets["first"])},
        ip_adapters=adapters,
        profile=ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-4"),
        output=output,
        backend="openvino" if xl else "onnxruntime",
        fuse=() if xl else ("first",),
    )
    build(options, "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline


def reference(family: Family, tensors: dict[str, Any], image_encoder: Path, *kinds: str) -> Any:
    """diffusers' ControlNet pipeline with these adapters."""
    pipeline = family.reference("first")
    pipeline.register_modules(image_encoder=CLIPVisionModelWithProjection.from_pretrained(image_encoder))
    pipeline.load_ip_adapter([tensors[kind] for kind in kinds], [""] * len(kinds), [""] * len(kinds))
    return pipeline


def drawn(pipeline: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents and the picture that diffusers' VAE makes of them."""
    (hint,) = hints(SIDE, 1)
    generator = torch.Generator("cpu").manual_seed(7)
    latents = pipeline(PROMPT, image=hint, generator=generator, output_type="latent", **SHARED, **options).images
    return latents.numpy(), decoded(pipeline, latents.numpy())


def check(compiled: ControlNetPipeline, expected: tuple[np.ndarray, np.ndarray], **options: Any) -> None:
    (hint,) = hints(SIDE, 1)
    found = [
        compiled(PROMPT, {"first": hint}, seed=7, output_type=kind, **SHARED, **options).images
        for kind in ("latent", "np")
    ]
    assert relative(found[0], expected[0]) < LATENTS_BOUND
    assert psnr(found[1], expected[1]) > PSNR_BOUND


@every_family
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("images", [1, 2])
def test_same_picture(
    prompted: ControlNetPipeline,
    family: Family,
    tensors: dict[str, Any],
    image_encoder: Path,
    guidance_scale: float,
    images: int,
) -> None:
    pictures = [photo(1), photo(2, 50, 70)][:images]
    for kind in tensors:
        pipeline = reference(family, tensors, image_encoder, kind)
        latents = []
        for scale in (0.6, 0.0):
            pipeline.set_ip_adapter_scale(scale)
            expected = drawn(pipeline, ip_adapter_image=[pictures], guidance_scale=guidance_scale)
            image, own = {kind: pictures if images > 1 else pictures[0]}, {kind: scale}
            check(prompted, expected, ip_adapter_image=image, ip_adapter_scale=own, guidance_scale=guidance_scale)
            latents.append(expected[0])
        assert relative(*latents) > 5 * LATENTS_BOUND  # the adapter shows


@every_family
def test_without_a_picture_it_is_the_plain_checkpoint(prompted: ControlNetPipeline, family: Family) -> None:
    check(prompted, drawn(family.reference("first"), guidance_scale=5.0), guidance_scale=5.0)


@sd15
def test_two_adapters_at_once(
    prompted: ControlNetPipeline, family: Family, tensors: dict[str, Any], image_encoder: Path
) -> None:
    """In diffusers' form: a list with the pictures of each; two rows of each, and a window of guidance beside it."""
    pipeline = reference(family, tensors, image_encoder, "plain", "full")
    pipeline.set_ip_adapter_scale([0.7, 0.4])
    shown = [photo(1), [photo(2), photo(3)]]
    options = {"num_images_per_prompt": 2, "guidance_scale": 4.0, "ip_adapter_image": shown}
    check(prompted, drawn(pipeline, **options), **options, ip_adapter_scale=[0.7, 0.4])


@sd15
def test_a_scale_of_each_step_and_a_window_of_guidance(
    prompted: ControlNetPipeline, family: Family, tensors: dict[str, Any], image_encoder: Path
) -> None:
    """Without guidance a step reads the conditional rows alone; diffusers draws the same at a scale of hardly 1."""
    pipeline = reference(family, tensors, image_encoder, "plain")
    scales = [0.9, 0.6, 0.3, 0.0]

    def after_step(_: Any, step: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipeline.set_ip_adapter_scale(scales[min(step + 1, 3)])
        if step == 1:
            pipeline._guidance_scale = 1 + 1e-9
        return given

    pipeline.set_ip_adapter_scale(scales[0])
    shared = {"ip_adapter_image": {"plain": photo(1)}, "guidance_scale": 5.0}
    expected = drawn(pipeline, **{**shared, "ip_adapter_image": [photo(1)]}, callback_on_step_end=after_step)
    check(prompted, expected, **shared, ip_adapter_scale={"plain": scales}, guidance_end=0.5)


@sd15
def test_without_control(
    prompted: ControlNetPipeline, family: Family, tensors: dict[str, Any], image_encoder: Path
) -> None:
    """The separate programs: with control the fused one runs."""
    pipeline = family.reference()
    pipeline.register_modules(image_encoder=CLIPVisionModelWithProjection.from_pretrained(image_encoder))
    pipeline.load_ip_adapter(tensors["full"], "", "")
    options: dict[str, Any] = {"ip_adapter_image": [photo(4)], "output_type": "latent", "guidance_scale": 5.0, **SHARED}
    expected = pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(7), width=SIDE, height=SIDE, **options)
    found = prompted(PROMPT, seed=7, **options | {"ip_adapter_image": {"full": photo(4)}})
    check_same(prompted, found.images, pipeline, expected.images)


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "scale": ({"ip_adapter_scale": 0.3}, []),
    "no picture": ({"ip_adapter_image": None}, []),
    "picture": ({"ip_adapter_image": {"plain": photo(2)}}, ["ip_adapter.plain", "unet.image"]),
    "a picture more": (
        {"ip_adapter_image": {"plain": [photo(1), photo(2)]}},
        ["unet.image", "ip_adapter.plain", "unet.image"],
    ),
    "prompt": ({"prompt": "a moon"}, ["text_encoder", "unet.prompt"]),
    "no guidance": ({"guidance_scale": 1.0}, []),
}


@sd15
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_only_what_changed_runs_again(
    prompted: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: list[str]
) -> None:
    usual: dict[str, Any] = {"prompt": PROMPT, "ip_adapter_image": {"plain": photo(1)}, "output_type": "latent"}
    usual |= {"num_inference_steps": 1, "seed": 1}
    monkeypatch.setattr(prompted, "_conditioner", Conditioner(prompted.bundle, prompted._executor))
    ran: list[str] = []
    run = prompted._executor.run

    def recorded(program: str, inputs: Any) -> Any:
        ran.append(program)
        return run(program, inputs)

    monkeypatch.setattr(prompted._executor, "run", recorded)
    prompted(**usual)
    assert sorted(ran) == sorted(
        [*["ip_adapter.plain", "unet.image", "text_encoder", "unet.prompt"] * 2, "unet.timestep"]
    )
    ran.clear()
    prompted(**usual | change)
    assert ran == expected


@sd15
def test_on_the_command_line(prompted: ControlNetPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(prompted.bundle.path)
    photo(1).save(tmp_path / "photo.png")
    arguments = [bundle, "--prompt", PROMPT, "--steps", "2", "--seed", "3", "-o", str(tmp_path / "out.png")]
    assert main(["generate", *arguments, "--ip-adapter-image", f"plain={tmp_path}/photo.png,scale=0.5"]) == 0
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "ip_adapter_image": {"plain": photo(1)}}
    expected = prompted(PROMPT, **options, ip_adapter_scale={"plain": 0.5}).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))
    capsys.readouterr()
    assert main(["inspect", bundle, "--graph"]) == 0
    drawn = capsys.readouterr().out
    assert "once per image prompt\n    ip_adapter.plain: picture, seen -> ip_embeds" in drawn
