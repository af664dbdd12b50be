"""Behaviour of the pipeline on the demo bundle; tests/parity compares its numbers with diffusers."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from controlrt.runtime import ControlNetPipeline, hires_fix
from controlrt.runtime.errors import ControlRTError, ParameterError, ProfileError, UnknownNameError, UserError
from controlrt.runtime.executors import base

pytestmark = pytest.mark.bundle
PROMPT = "a red star on a light blue background"
FEW = {"num_inference_steps": 2, "seed": 3}


def mask() -> Image.Image:
    picture = np.zeros((512, 512, 3), np.uint8)
    picture[150:350, 150:350] = 255
    return Image.fromarray(picture)


def latents(demo: ControlNetPipeline, *arguments: Any, **options: Any) -> NDArray[np.float32]:
    return demo(*arguments, output_type="latent", **{**FEW, **options}).images


def test_output_types(demo: ControlNetPipeline) -> None:
    pil = demo(PROMPT, {"mask": mask()}, **FEW)
    array = demo(PROMPT, {"mask": mask()}, output_type="np", **FEW).images
    assert pil.images[0].size == (512, 512)
    assert array.shape == (1, 512, 512, 3)
    assert 0 <= array.min() < array.max() <= 1
    np.testing.assert_array_equal(np.asarray(pil.images[0]), np.round(array[0] * 255).astype(np.uint8))
    assert len(pil.timings.steps) == 2
    assert pil.seed == 3


def test_a_call_hands_all_of_its_arguments_to_prepare(
    demo: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both declare them: names, kinds, types and defaults are the same."""
    own = {"callback_on_step_end", "output_type"}
    called = dict(inspect.signature(ControlNetPipeline.__call__).parameters)
    prepared = dict(inspect.signature(ControlNetPipeline.prepare).parameters)
    assert [each for name, each in called.items() if name not in own] == list(prepared.values())

    seen: dict[str, Any] = {}

    def prepare(prompt: Any, image: Any, **others: Any) -> Any:
        seen.update(prompt=prompt, image=image, **others)
        raise ControlRTError("seen")

    monkeypatch.setattr(demo, "prepare", prepare)
    arguments = {name: object() for name in prepared if name != "self"}
    with pytest.raises(ControlRTError, match="seen"):
        demo(**arguments)
    assert seen == arguments


def test_same_seed_same_picture_and_other_seed_another(demo: ControlNetPipeline) -> None:
    first = latents(demo, PROMPT, {"mask": mask()})
    latents(demo, "a black moon", {"canny": mask()}, seed=9)  # leaves other bytes in the buffers
    np.testing.assert_array_equal(latents(demo, PROMPT, {"mask": mask()}), first)
    assert np.abs(latents(demo, PROMPT, {"mask": mask()}, seed=4) - first).max() > 0.1


def test_how_control_acts_is_bytes_in_one_plan(demo: ControlNetPipeline) -> None:
    """Scales of any kind, modes and regions need no new plan; and none of them leaves anything behind."""
    half = np.zeros((512, 512), np.uint8)
    half[:, :256] = 255
    first = latents(demo, PROMPT, {"mask": mask()})
    (plan,) = {id(demo._bound[layout]) for layout in list(demo._bound)[-1:]}
    changes: list[dict[str, Any]] = [
        {"controlnet_conditioning_scale": 0.3},
        {"controlnet_conditioning_scale": {"mask": [1.0, 0.2]}},
        {"controlnet_conditioning_scale": lambda done: 1 - done},
        {"control_layer_weights": "soft"},
        {"control_mode": "prompt"},
        {"control_region": half},
        {"guidance_rescale": 0.7},
        {"guidance_scale": 3.0},
    ]
    for change in changes:
        assert np.abs(latents(demo, PROMPT, {"mask": mask()}, **change) - first).max() > 1e-3
        assert id(next(reversed(demo._bound.values()))) == plan
    latents(demo, PROMPT, {"mask": mask()}, guess_mode=True)
    latents(demo, PROMPT, {"mask": mask()}, init_image=mask(), mask_image=half, num_inference_steps=2)
    np.testing.assert_array_equal(latents(demo, PROMPT, {"mask": mask()}), first)


@pytest.mark.parametrize(
    ("said", "rows"),
    [({}, None), ({"guess_mode": True}, range(1, 2)), ({"control_mode": "controlnet"}, range(1, 2))],
)
def test_where_the_unconditional_half_needs_no_control_it_is_not_computed(
    demo: ControlNetPipeline, said: dict[str, Any], rows: range | None
) -> None:
    drawing = demo.prepare(PROMPT, {"mask": mask()}, num_inference_steps=2, **said)
    for control, unet in demo.plan(drawing.layout).steps:
        assert (control.program, unet.program) == ("controlnet.mask.step", "unet.step")
        assert {view.rows for view in control.outputs.values()} == {rows}
        assert unet.inputs["residual_0_in"].rows is None


def test_what_a_mask_leaves_stays(demo: ControlNetPipeline) -> None:
    """The known half of the latents is the same whatever is drawn in the other."""
    left = np.zeros((512, 512), np.uint8)
    left[:, :256] = 255
    one, other = (
        latents(demo, prompt, {"mask": mask()}, init_image=mask(), mask_image=left)
        for prompt in (PROMPT, "a black moon on a green background")
    )
    np.testing.assert_array_equal(one[..., 32:], other[..., 32:])
    assert np.abs(one[..., :32] - other[..., :32]).mean() > 0.05


def test_a_seed_is_chosen_and_told(demo: ControlNetPipeline) -> None:
    one = demo(PROMPT, num_inference_steps=1, output_type="latent")
    two = demo(PROMPT, num_inference_steps=1, output_type="latent")
    assert one.seed != two.seed
    np.testing.assert_array_equal(latents(demo, PROMPT, num_inference_steps=1, seed=one.seed), one.images)


@pytest.mark.parametrize("rescale", [-0.1, 1.5, float("nan"), "1", True])
def test_guidance_rescale_is_a_fraction(demo: ControlNetPipeline, rescale: Any) -> None:
    with pytest.raises(ParameterError, match="guidance_rescale"):
        latents(demo, PROMPT, guidance_rescale=rescale)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"upscaler": "bicubic"}, "latent or lanczos"),
        ({"init_image": mask()}, "left out"),
        ({"width": 1024}, "512x512"),
        ({"vae_tiling": True}, "vae_tiling"),
    ],
)
def test_hires_refuses_before_it_draws(demo: ControlNetPipeline, options: dict[str, Any], says: str) -> None:
    sizes = {"first_size": (512, 512), "width": 512, "height": 512}
    with pytest.raises(UserError, match=says):
        hires_fix(demo, PROMPT, **{**sizes, **options})


def test_scale_zero_and_a_closed_window_equal_no_control(demo: ControlNetPipeline) -> None:
    without = latents(demo, PROMPT)
    zero = latents(demo, PROMPT, {"mask": mask()}, controlnet_conditioning_scale=0.0)
    closed = latents(demo, PROMPT, {"mask": mask()}, control_guidance_start=0.9)
    np.testing.assert_array_equal(zero, without)
    np.testing.assert_array_equal(closed, without)
    assert np.abs(latents(demo, PROMPT, {"mask": mask()}) - without).max() > 0.1


def test_what_a_plan_draws_does_not_depend_on_those_before_it(demo: ControlNetPipeline) -> None:
    """Plans share memory: one that acts on half of the rows relies on zeros in the others."""
    both = {"canny": mask(), "mask": mask()}
    halves = {"guidance_end": 0.5, "control_mode": {"canny": "controlnet", "mask": "prompt"}}
    demo._bound.clear()
    alone = latents(demo, PROMPT, both, **halves)
    demo._bound.clear()
    latents(demo, PROMPT, both)
    latents(demo, PROMPT, both, guess_mode=True)
    np.testing.assert_array_equal(latents(demo, PROMPT, both, **halves), alone)
    assert len(demo._bound) == 3
    assert len({id(bound.buffers["latents.0"]) for bound in demo._bound.values()}) == 1


def test_what_plans_share_does_not_grow(demo: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_KEPT_LAUNCHES", 3)
    demo._bound.clear()
    drawn = [latents(demo, PROMPT, {"mask": mask()}, control_guidance_end=end) for end in (1.0, 0.5, 1.0)]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    (memory,) = {id(bound.memory): bound.memory for bound in demo._bound.values()}.values()
    assert len(memory._launches) == 3


def test_guidance_windows(demo: ControlNetPipeline) -> None:
    """The whole one is guidance as ever, one that no step lies in is none, and any other is between."""
    hint = {"mask": mask()}
    whole, none = latents(demo, PROMPT, hint), latents(demo, PROMPT, hint, guidance_scale=1.0)
    np.testing.assert_array_equal(latents(demo, PROMPT, hint, guidance_start=0.0, guidance_end=1.0), whole)
    np.testing.assert_array_equal(latents(demo, PROMPT, hint, guidance_start=0.6, guidance_end=0.9), none)
    np.testing.assert_array_equal(latents(demo, PROMPT, hint, guidance_scale=1.0, guidance_end=0.5), none)
    first, second = latents(demo, PROMPT, hint, guidance_end=0.5), latents(demo, PROMPT, hint, guidance_start=0.5)
    for one, other in ((first, whole), (first, none), (second, whole), (second, none), (first, second)):
        assert np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(latents(demo, PROMPT, hint), whole)


def test_steps_without_guidance_do_not_see_the_negative_prompt(demo: ControlNetPipeline) -> None:
    def after_one_step(negative: str, start: float, end: float) -> NDArray[np.float32]:
        window = {"negative_prompt": negative, "guidance_start": start, "guidance_end": end}
        seen = []
        latents(demo, PROMPT, callback_on_step_end=lambda *call: seen.append(call[3]["latents"]), **window)
        return seen[0]

    moon, sun = (after_one_step(negative, 0.5, 1.0) for negative in ("a moon", "a sun"))
    np.testing.assert_array_equal(moon, sun)
    moon, sun = (after_one_step(negative, 0.0, 0.5) for negative in ("a moon", "a sun"))
    assert np.abs(moon - sun).max() > 1e-3


def test_rows_of_a_batch_do_not_mix(demo: ControlNetPipeline) -> None:
    prompts = [PROMPT, "a green circle on a black background"]
    together = latents(demo, prompts, {"mask": mask()}, seed=[1, 2])
    for row, (prompt, seed) in enumerate(zip(prompts, (1, 2), strict=True)):
        alone = latents(demo, prompt, {"mask": mask()}, seed=seed)
        # another batch size may take other kernels, so only float32 rounding separates them
        assert np.abs(together[row] - alone[0]).max() < 1e-4


def test_own_noise(demo: ControlNetPipeline) -> None:
    noise = np.random.default_rng(0).normal(size=(1, 4, 64, 64)).astype(np.float32)
    first = latents(demo, PROMPT, latents=noise)
    assert np.abs(first - latents(demo, PROMPT, latents=noise + 0.5)).max() > 0.01
    for bad in (noise[:, :, :32], noise * np.nan):
        with pytest.raises(ParameterError, match="latents"):
            latents(demo, PROMPT, latents=bad)


def test_callback_sees_and_replaces_latents(demo: ControlNetPipeline) -> None:
    seen = []

    def callback(pipeline: ControlNetPipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        assert pipeline is demo
        seen.append((step, timestep))
        return {"latents": np.zeros_like(values["latents"])} if step == 1 else {}

    final = latents(demo, PROMPT, callback_on_step_end=callback)
    assert seen == [(0, 999.0), (1, 499.0)]
    assert not final.any()


def test_after_an_error_in_a_callback_the_next_call_works(demo: ControlNetPipeline) -> None:
    expected = latents(demo, PROMPT)

    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        latents(demo, PROMPT, callback_on_step_end=fail)
    np.testing.assert_array_equal(latents(demo, PROMPT), expected)


def test_threads_wait_for_each_other(demo: ControlNetPipeline) -> None:
    expected = {seed: latents(demo, PROMPT, seed=seed) for seed in (1, 2, 3)}
    found: dict[int, NDArray[np.float32]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: latents(demo, PROMPT, seed=seed)}))
        for seed in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, value in expected.items():
        np.testing.assert_array_equal(found[seed], value)


@pytest.mark.parametrize(("scheduler", "calls"), [("Heun", 5), ("LMS Karras", 3), ("DPM++ SDE", 5), (None, 3)])
def test_second_order_samplers_call_the_model_twice(
    demo: ControlNetPipeline, scheduler: str | None, calls: int
) -> None:
    output = demo(PROMPT, num_inference_steps=3, seed=1, scheduler=scheduler, output_type="latent")
    assert len(output.timings.steps) == calls


def test_noise_on_the_way_follows_the_seed(demo: ControlNetPipeline) -> None:
    """A sampler that draws: same seed, same picture, after others ran on the same buffers; other noise, another."""
    euler_a = {"scheduler": "Euler a", "num_inference_steps": 3}
    first = latents(demo, PROMPT, **euler_a)
    latents(demo, PROMPT, scheduler="DPM++ 2M SDE", num_inference_steps=3, seed=8)
    np.testing.assert_array_equal(latents(demo, PROMPT, **euler_a), first)
    for other in ({"seed": 4}, {"noise": "gpu"}, {"scheduler": "Euler"}):
        assert np.abs(latents(demo, PROMPT, **{**euler_a, **other}) - first).max() > 0.1
    noise = np.random.default_rng(0).normal(size=(1, 4, 64, 64)).astype(np.float32)
    drawn = demo(PROMPT, latents=noise, output_type="latent", **euler_a)
    assert drawn.seed is not None  # latents were given, but the noise on the way has a seed
    again = demo(PROMPT, latents=noise, seed=drawn.seed, output_type="latent", **euler_a).images
    np.testing.assert_array_equal(again, drawn.images)


def test_a_sampler_that_keeps_history_leaves_none_behind(demo: ControlNetPipeline) -> None:
    first = latents(demo, PROMPT, scheduler="UniPC", num_inference_steps=4)
    latents(demo, "a black moon", scheduler="LMS", num_inference_steps=4, seed=11)
    np.testing.assert_array_equal(latents(demo, PROMPT, scheduler="UniPC", num_inference_steps=4), first)


def test_custom_timesteps_and_options(demo: ControlNetPipeline) -> None:
    by_steps = latents(demo, PROMPT, scheduler="Euler", num_inference_steps=4)
    told = [int(t) for t in demo.sampler_table("Euler", 4).timesteps]
    by_timesteps = latents(demo, PROMPT, scheduler="Euler", num_inference_steps=None, timesteps=told)
    np.testing.assert_array_equal(by_timesteps, by_steps)
    by_options = latents(
        demo,
        PROMPT,
        scheduler={"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
        num_inference_steps=4,
    )
    np.testing.assert_array_equal(by_options, by_steps)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_inference_steps": 0}, ParameterError, "from 1 to 1000"),
        ({"guidance_scale": float("nan")}, ParameterError, "guidance_scale"),
        ({"controlnet_conditioning_scale": float("nan"), "image": {"mask": mask()}}, ParameterError, "finite"),
        ({"controlnet_conditioning_scale": float("nan")}, ParameterError, "finite"),
        ({"image": {"depth": mask()}}, UnknownNameError, "canny, mask"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, ParameterError, "guidance_start .*less than guidance_end"),
        ({"guidance_end": 1.5}, ParameterError, "guidance_end .*from 0 to 1"),
        ({"guidance_start": float("nan")}, ParameterError, "guidance_start .*from 0 to 1"),
        ({"guidance_end": True}, ParameterError, "guidance_end .*from 0 to 1"),
        ({"scheduler": "DDIMM"}, UnknownNameError, "did you mean"),
        ({"scheduler": {"use_karras": True}}, UnknownNameError, "option of DDIMScheduler"),
        ({"eta": 2}, ParameterError, "eta"),
        ({"noise": "mps"}, ParameterError, "cpu or gpu"),
        ({"sigmas": [3, 0]}, ParameterError, "EulerDiscreteScheduler"),
        ({"width": 500}, ProfileError, "448 or 512"),
        ({"width": 768}, ProfileError, "--profile 768x512"),
        ({"width": 0}, ProfileError, "64"),
        ({"num_images_per_prompt": 9}, ParameterError, "--batch 1-9"),
        ({"num_images_per_prompt": 0}, ParameterError, "at least 1"),
        ({"seed": [1, 2]}, ParameterError, "one for each picture"),
        ({"seed": "7"}, ParameterError, "seed"),
        ({"negative_prompt": ["a", "b"]}, ParameterError, "negative_prompt"),
        ({"output_type": "jpeg"}, ParameterError, "pil, np or latent"),
        ({"prompt": []}, ParameterError, "prompt"),
        ({"prompt": 7}, ParameterError, "prompt"),
        (
            {"resize": "squash", "image": {"mask": mask()}},
            UnknownNameError,
            "stretch, crop, pad, fill",
        ),
    ],
)
def test_refusals(demo: ControlNetPipeline, options: dict[str, Any], error: type[ControlRTError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        demo(**{"prompt": PROMPT, **options})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
