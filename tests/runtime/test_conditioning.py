"""The stages before the loop: each runs once for what it depends on, and again only when that changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.conditioning import Conditioner, _Kept
from controlrt.runtime.control_use import ControlHint, ControlUse
from controlrt.runtime.manifest import (
    SCHEMA_VERSION,
    Control,
    Manifest,
    Model,
    Program,
    Provenance,
    Stage,
    TensorSpec,
)
from controlrt.runtime.plan import Layout, Plan, StepLayout, plan_denoising
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.prompts import Encoding


@pytest.fixture(scope="module")
def pipeline(demo_bundle: Path) -> Iterator[ControlNetPipeline]:
    """One of its own: what it keeps is what these tests made it keep."""
    with ControlNetPipeline.load(demo_bundle, verify=False) as pipeline:
        yield pipeline


@pytest.fixture
def runs(pipeline: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that run by themselves, in order; those of the loop are bound, not run."""
    names: list[str] = []
    run = pipeline._executor.run

    def recorded(program: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names.append(program)
        return run(program, inputs)

    monkeypatch.setattr(pipeline._executor, "run", recorded)
    return names


def hint(level: int) -> NDArray[np.uint8]:
    picture = np.zeros((512, 512, 3), np.uint8)
    picture[100:300, 100:300] = level
    return picture


USUAL: dict[str, Any] = {
    "prompt": "a red star",
    "image": {"mask": hint(255)},
    "negative_prompt": "a moon",
    "num_inference_steps": 2,
    "seed": 1,
    "output_type": "latent",
}
EVERYTHING = [
    *["text_encoder"] * 2,
    "controlnet.mask.timestep",
    *["controlnet.mask.prompt"] * 2,
    "controlnet.mask.hint",
    "unet.timestep",
    *["unet.prompt"] * 2,
]
"""What runs at first: one prompt and one negative one, a schedule, a hint."""
CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "seed": ({"seed": 2}, []),
    "guidance": ({"guidance_scale": 3.0}, []),
    "window of guidance": ({"guidance_end": 0.5}, []),
    "no guidance": ({"guidance_scale": 1.0}, []),
    "scale": ({"controlnet_conditioning_scale": 0.5}, []),
    "prompt": ({"prompt": "a red circle"}, ["text_encoder", "controlnet.mask.prompt", "unet.prompt"]),
    "negative prompt": ({"negative_prompt": "a sun"}, ["text_encoder", "controlnet.mask.prompt", "unet.prompt"]),
    "prompts swapped": ({"prompt": "a moon", "negative_prompt": "a red star"}, []),
    "schedule": ({"num_inference_steps": 3}, ["controlnet.mask.timestep", "unet.timestep"]),
    "sampler of other timesteps": ({"scheduler": "DPM++ SDE"}, ["controlnet.mask.timestep", "unet.timestep"]),
    "sampler of the same timesteps": ({"scheduler": "Euler"}, []),
    "hint": ({"image": {"mask": hint(128)}}, ["controlnet.mask.hint"]),
    "hint as floats": ({"image": {"mask": hint(255).astype(np.float32) / 255}}, []),
    "no control": ({"image": None}, []),
    "a control that is off": (
        {"image": {"mask": hint(255), "canny": hint(255)}, "controlnet_conditioning_scale": [1, 0]},
        [],
    ),
    "a second control": (
        {"image": {"mask": hint(255), "canny": hint(255)}},
        ["controlnet.canny.timestep", *["controlnet.canny.prompt"] * 2, "controlnet.canny.hint"],
    ),
    "several pictures": ({"num_images_per_prompt": 2}, []),
    "several prompts": (
        {"prompt": ["a red star", "a blue star", "a red star"], "negative_prompt": ["a moon"] * 3},
        ["text_encoder", "controlnet.mask.prompt", "unet.prompt"],
    ),
    "several hints": (
        {"prompt": ["a red star"] * 2, "negative_prompt": ["a moon"] * 2, "image": {"mask": [hint(64), hint(255)]}},
        ["controlnet.mask.hint"],
    ),
    "pictures": ({"output_type": "np"}, ["vae_decoder"]),
}


@pytest.mark.bundle
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_only_what_changed_runs_again(
    pipeline: ControlNetPipeline, runs: list[str], change: dict[str, Any], expected: list[str]
) -> None:
    pipeline._conditioner = Conditioner(pipeline.bundle, pipeline._executor)
    pipeline(**USUAL)
    assert sorted(runs) == sorted(EVERYTHING)
    runs.clear()
    first = pipeline(**{**USUAL, **change}).images
    assert sorted(runs) == sorted(expected)
    runs.clear()
    again = pipeline(**{**USUAL, **change}).images
    assert [name for name in runs if name != "vae_decoder"] == []
    np.testing.assert_array_equal(again, first)


@pytest.mark.bundle
def test_what_is_kept_gives_the_same_picture(pipeline: ControlNetPipeline) -> None:
    calls = [{**USUAL, **CHANGES[name][0]} for name in ("prompts swapped", "schedule", "several hints", "no control")]
    kept = [pipeline(**call).images for call in calls]
    for call, latents in zip(calls, kept, strict=True):
        pipeline._conditioner = Conditioner(pipeline.bundle, pipeline._executor)
        np.testing.assert_array_equal(pipeline(**call).images, latents)


@pytest.mark.bundle
@pytest.mark.parametrize("kept_bytes", [0, 100_000, 3_000_000])
def test_a_bound_on_bytes_is_kept_to(pipeline: ControlNetPipeline, kept_bytes: int) -> None:
    """However little is kept, the picture is the same."""
    expected = pipeline(**USUAL).images
    conditioner = Conditioner(pipeline.bundle, pipeline._executor, kept_bytes=kept_bytes)
    pipeline._conditioner = conditioner
    for number in range(6):
        pipeline(**{**USUAL, "prompt": f"number {number}", "num_inference_steps": 1})
        held = sum(array.nbytes for entry in conditioner._kept._entries.values() for array in entry.values())
        assert held == conditioner._kept._bytes
        assert held <= kept_bytes or len(conditioner._kept._entries) == 1
    np.testing.assert_array_equal(pipeline(**USUAL).images, expected)


sizes = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=40)


@given(calls=sizes, bound=st.integers(0, 100))
def test_least_recently_used_goes_first(calls: list[tuple[int, int]], bound: int) -> None:
    """Against a list of keys in the order of their last use."""
    kept = _Kept(4 * bound)
    reference: list[tuple[int, int]] = []
    for key in calls:
        made = []

        def make(key: tuple[int, int] = key, made: list[int] = made) -> dict[str, NDArray[np.float32]]:
            made.append(1)
            return {"value": np.full(key[1], key[0], np.float32)}

        found = kept.get(key, make)
        assert (found["value"] == key[0]).all()
        assert len(found["value"]) == key[1]
        assert bool(made) == (key not in reference)
        reference = [other for other in reference if other != key] + [key]
        while sum(size for _, size in reference) > bound and len(reference) > 1:
            reference.pop(0)
        assert list(kept._entries) == reference
        assert kept._bytes == 4 * sum(size for _, size in reference)


class Recorder:
    """An executor whose every program tells its inputs apart: entries are numbered in the order of the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, NDArray[Any]]]] = []

    def run(self, program: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls.append((program, {name: value.copy() for name, value in inputs.items()}))
        entries = len(next(iter(inputs.values())))
        stage = program.rpartition(".")[2]
        if stage == "hint":
            (value,) = inputs.values()
            return {"hint_0": value[:, :2, ::8, ::8] + np.float32(1)}
        marks = np.arange(entries, dtype=np.float32)[:, None] + 100 * len(self.calls)
        return {f"{stage}_0": np.repeat(marks, 3, axis=1)}


def tensor(name: str, *shape: int | str, dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def program(part: str, stage: Stage, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Program:
    return Program(
        name=f"{part}.{stage}",
        part=part,
        stage=stage,
        file="",
        cost=None,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        max_relative_error=0.0,
        export_seconds=0.0,
    )


def manifest() -> Manifest:
    """A UNet with SDXL's conditioning and a ControlNet, for pictures of several sizes."""
    latents = tensor("latents", "batch", 4, "height/8", "width/8")
    added = tensor("prompt_timestep_0", "rows", 3)
    programs = [
        program("unet", "timestep", [tensor("timestep", "steps")], [tensor("timestep_0", "steps", 3)]),
        program("unet", "prompt", [tensor("prompt_embeds", "prompts", 7, 5)], [tensor("prompt_0", "prompts", 3)]),
        program(
            "unet",
            "prompt_timestep",
            [tensor("timestep", "entries"), tensor("text_embeds", "entries", 5), tensor("time_ids", "entries", 6)],
            [tensor("prompt_timestep_0", "entries", 3)],
        ),
        program(
            "unet",
            "step",
            [latents, tensor("timestep_0", "batch", 3), tensor("prompt_0", "rows", 3), added],
            [tensor("next_latents", *latents.shape)],
        ),
        program(
            "controlnet.a",
            "hint",
            [tensor("hint", "batch", 3, "height", "width")],
            [tensor("hint_0", "batch", 2, "height/8", "width/8")],
        ),
        program(
            "controlnet.a",
            "step",
            [latents, tensor("hint_0", "batch", 2, "height/8", "width/8")],
            [tensor("residual_0", "rows", 8)],
        ),
    ]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        key="0" * 64,
        backend="onnxruntime",
        precision="fp32",
        profile=ShapeProfile.parse("64-128x64-128", "1-4"),
        model=Model(source="", latent_channels=4, vae_scale_factor=8, time_ids=True, zero_empty_negative=True),
        text_encoders=(),
        controls=(Control(name="a", kind="controlnet", part="controlnet.a", source="", layers=1),),
        fusion=None,
        programs=tuple(programs),
        checks=(),
        files={},
        provenance=Provenance(created="", command="", sources={}, versions={}),
    )


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def conditioner(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Conditioner:
    conditioner = Conditioner(Bundle(Path(), manifest()), recorder)  # type: ignore[arg-type]

    def encode(prompt: str | None, _: Encoding) -> dict[str, NDArray[np.float32]]:
        level = np.float32(0 if prompt is None else len(prompt))
        return {"prompt_embeds": np.full((1, 7, 5), level), "text_embeds": np.full((1, 5), level)}

    monkeypatch.setattr(conditioner.prompts, "encode", encode)
    return conditioner


def planned(width: int, height: int, steps: int = 2, batch: int = 2) -> tuple[Plan, dict[str, NDArray[Any]]]:
    step = StepLayout(controls=("a",), guided=True)
    plan = plan_denoising(
        manifest(), Layout(width=width, height=height, batch=batch, draws=False, steps=(step,) * steps)
    )
    return plan, {name: np.zeros(shape, dtype) for name, (shape, dtype) in plan.buffers.items()}


def use_of(picture: NDArray[np.float32]) -> ControlUse:
    hint = ControlHint(name="a", picture=picture, start=0.0, end=1.0)
    scale = np.ones((2, 2, 1))
    return ControlUse(control=manifest().controls[0], hints=(hint,), scale=scale, conditional=False, region=None)


def fill(
    conditioner: Conditioner, width: int = 64, height: int = 64, level: float = 0.0, **changes: Any
) -> dict[str, NDArray[Any]]:
    plan, buffers = planned(width, height)
    arguments: dict[str, Any] = {
        "prompts": [(text, Encoding()) for text in (None, None, "ab", "abc")],
        "timesteps": np.array([900.0, 20.0], np.float32),
        "uses": [use_of(np.full((2, 3, height, width), level, np.float32))],
        "size": (width, height),
        "guidance_scale": 7.5,
    }
    conditioner.fill(plan, buffers, **{**arguments, **changes})
    return buffers


def test_every_row_gets_its_own(conditioner: Conditioner, recorder: Recorder) -> None:
    buffers = fill(conditioner)
    # a step's timestep is that of each of its pictures
    steps = buffers["timestep_0.unet"][:, :, 0]
    np.testing.assert_array_equal(steps[1] - steps[0], 1)
    np.testing.assert_array_equal(steps[:, 0], steps[:, 1])
    prompts = buffers["prompt_0.unet"][:, 0]
    assert prompts[0] == prompts[1]
    assert len(set(prompts.tolist())) == 3
    table = buffers["prompt_timestep_0.unet"][:, :, 0]
    np.testing.assert_array_equal(table[1] - table[0], 1)  # entries of one prompt are its steps in order
    np.testing.assert_array_equal(table[:, 0], table[:, 1])
    assert len(set(table[0].tolist())) == 3
    assert sorted(name for name, _ in recorder.calls) == sorted(
        ["unet.timestep", *["unet.prompt"] * 3, *["unet.prompt_timestep"] * 3, "controlnet.a.hint"]
    )


def test_added_conditioning(conditioner: Conditioner, recorder: Recorder) -> None:
    """(original height, width, crop top, left, target height, width), as diffusers orders them."""
    fill(conditioner, width=128, height=64)
    given = [inputs for name, inputs in recorder.calls if name == "unet.prompt_timestep"]
    for inputs in given:
        np.testing.assert_array_equal(inputs["time_ids"], [[64, 128, 0, 0, 64, 128]] * 2)
        np.testing.assert_array_equal(inputs["timestep"], [900, 20])
    assert [float(inputs["text_embeds"][0, 0]) for inputs in given] == [0, 2, 3]


def test_sizes_are_part_of_added_conditioning(conditioner: Conditioner, recorder: Recorder) -> None:
    fill(conditioner, width=128, height=64)
    recorder.calls.clear()
    fill(conditioner, width=64, height=128)
    assert [name for name, _ in recorder.calls if name.startswith("unet")] == ["unet.prompt_timestep"] * 3


def test_hints_of_the_same_bytes_and_another_shape(conditioner: Conditioner) -> None:
    """A black picture lying and standing."""
    wide = fill(conditioner, width=128, height=64)["hint_0.controlnet.a"]
    tall = fill(conditioner, width=64, height=128)["hint_0.controlnet.a"]
    assert wide.shape == (2, 2, 8, 16)
    assert tall.shape == (2, 2, 16, 8)
    assert (wide == 1).all()
    assert (tall == 1).all()


def test_pictures_with_hints_of_their_own(conditioner: Conditioner, recorder: Recorder) -> None:
    hints = np.stack([np.full((3, 64, 64), level, np.float32) for level in (0.25, 0.5)])
    found = fill(conditioner, uses=[use_of(hints)])["hint_0.controlnet.a"]
    np.testing.assert_array_equal(found[:, 0, 0, 0], [1.25, 1.5])
    recorder.calls.clear()
    found = fill(conditioner, uses=[use_of(hints[::-1])])["hint_0.controlnet.a"]
    np.testing.assert_array_equal(found[:, 0, 0, 0], [1.5, 1.25])
    assert recorder.calls == []
