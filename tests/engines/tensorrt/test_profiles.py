"""Optimization profiles from a profile of shapes."""

from __future__ import annotations

import pytest

from controlrt.engines.tensorrt.profiles import optimization_profiles
from controlrt.runtime.errors import BuildError
from controlrt.runtime.manifest import Program, Stage, TensorSpec
from controlrt.runtime.profile import ShapeProfile


def program(stage: Stage | None, **shapes: tuple[int | str, ...]) -> Program:
    return Program(
        name="unet",
        part="unet",
        stage=stage,
        file="programs/unet.onnx",
        cost=None,
        inputs=tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()),
        outputs=(),
        max_relative_error=0.0,
        export_seconds=0.0,
    )


STEP = program(
    "step",
    latents=("batch", 4, "height/8", "width/8"),
    residual=("rows", 32, "height/64", "width/64"),
    prompt_0=("rows", "tokens", 64),
    clip=(1, 3),
)


@pytest.mark.parametrize("stage", ["encode", "step"])
def test_a_fixed_batch_gives_one_profile_with_guidance_and_one_without(stage: Stage) -> None:
    fixed = program(stage, latents=(2, 4, 64, 64), rows=("rows",), guidance=(2, "rows"))
    assert optimization_profiles(fixed, ShapeProfile.parse("512x512", "2")) == [
        {"rows": ((4,), (4,), (4,)), "guidance": ((2, 4), (2, 4), (2, 4))},
        {"rows": ((2,), (2,), (2,)), "guidance": ((2, 2), (2, 2), (2, 2))},
    ]


def test_ranges() -> None:
    (found,) = optimization_profiles(STEP, ShapeProfile.parse("512-1024x256-768", "1-4", "1-3"))
    assert found == {
        "latents": ((1, 4, 32, 64), (1, 4, 96, 128), (4, 4, 96, 128)),
        "residual": ((1, 32, 4, 8), (2, 32, 12, 16), (8, 32, 12, 16)),
        "prompt_0": ((1, 77, 64), (2, 77, 64), (8, 231, 64)),
    }


def test_image_prompts_are_tuned_for_one_picture() -> None:
    step = program("step", image_0=("rows", "images_0*16", 64), image_1=("rows", "images_1*4", 64))
    (found,) = optimization_profiles(step, ShapeProfile.parse("512x512", "1-2"))
    assert found == {
        "image_0": ((1, 16, 64), (2, 16, 64), (4, 128, 64)),
        "image_1": ((1, 4, 64), (2, 4, 64), (4, 32, 64)),
    }


def test_every_size_has_its_own() -> None:
    found = optimization_profiles(STEP, ShapeProfile.parse("512x512,1024x768", "1-2"))
    assert [each["latents"] for each in found] == [
        ((1, 4, 64, 64), (1, 4, 64, 64), (2, 4, 64, 64)),
        ((1, 4, 96, 128), (1, 4, 96, 128), (2, 4, 96, 128)),
    ]


def test_what_sizes_do_not_matter_to_has_one() -> None:
    stage = program("timestep", timestep=("steps",))
    (found,) = optimization_profiles(stage, ShapeProfile.parse("512x512,1024x1024", "1-2"))
    low, best, high = found["timestep"]
    assert (low, high) == ((1,), (2000,))  # a thousand steps of a sampler of the second order
    assert low < best < high


def test_what_is_not_a_step_runs_for_one_picture() -> None:
    encoder = program(None, input_ids=("batch", 77), extra_embeddings=("extra", 64))
    (found,) = optimization_profiles(encoder, ShapeProfile.parse("512x512", "4"))
    assert found["input_ids"] == ((1, 77), (1, 77), (1, 77))
    assert found["extra_embeddings"][0] == (1, 64)


def test_a_static_program_has_an_empty_one() -> None:
    assert optimization_profiles(program(None, picture=(1, 3)), ShapeProfile.parse("512x512")) == [{}]


def test_a_dimension_that_nobody_knows_is_named() -> None:
    with pytest.raises(BuildError, match="program unet: nothing says how large depth may be"):
        optimization_profiles(program("step", latents=("batch", "depth")), ShapeProfile.parse("512x512", "1-2"))
