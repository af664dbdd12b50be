"""Drawings in company against the same calls alone. Latents are compared: rounding depends on the batch, 1e-4 of their
norm is 80 dB, and a row that strays into another picture is off by its whole size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from controlled_calls import CALLS, PROMPT, STEPS, draw, square
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.errors import NotFiniteError
from controlrt.runtime.stepping import Staged, Stepper

pytestmark = pytest.mark.bundle
BOUND = 1e-4
MOST = 4
"""Pictures that the demo bundle draws at once."""


@pytest.fixture(scope="module")
def stepper(demo: ControlNetPipeline) -> Iterator[Stepper]:
    found = Stepper(demo.bundle, demo._executor)
    yield found
    found.close()


def staged(demo: ControlNetPipeline, prompt: str = PROMPT, **changes: Any) -> Staged:
    options = {"image": {"mask": square()}, "num_inference_steps": STEPS, "seed": 3, **changes}
    prepared = demo.prepare(prompt, **options)
    drawing = Staged(demo.plan(prepared.layout), prepared)
    demo.fill(drawing.drawing, drawing.plan, drawing.buffers)
    return drawing


def together(waiting: list[Staged], rng: random.Random) -> list[Staged]:
    """Some of those that can take their next step with a random one of them."""
    first = rng.choice(waiting)
    fitting = [first, *(each for each in waiting if each is not first and each.kind == first.kind)]
    chosen: list[Staged] = []
    for each in fitting:
        if sum(one.batch for one in [*chosen, each]) <= MOST and (not chosen or rng.random() < 0.8):
            chosen.append(each)
    rng.shuffle(chosen)
    return chosen


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_every_kind_of_call_in_any_company(demo: ControlNetPipeline, stepper: Stepper) -> None:
    """All at once, each step with whoever fits, in a random order."""
    drawings = {name: staged(demo, **changes) for name, changes in CALLS.items()}
    rng = random.Random(5)
    while waiting := [each for each in drawings.values() if not each.done]:
        stepper.step(together(waiting, rng))
    for name, changes in CALLS.items():
        assert relative(drawings[name].latents, draw(demo, **changes)) < BOUND, name


def test_samplers_step_counts_prompts_seeds_and_scales_in_one_batch(demo: ControlNetPipeline, stepper: Stepper) -> None:
    """All of one kind, so that every step is taken by as many as there are; the last joins when another leaves."""
    calls: list[dict[str, Any]] = [
        {"scheduler": "DPM++ 2M Karras", "num_inference_steps": 7, "seed": 1},
        {"scheduler": "Euler a", "num_inference_steps": 4, "seed": 2, "prompt": "a blue moon on a white background"},
        {"scheduler": "UniPC", "num_inference_steps": 5, "image": {"mask": square(40)}, "guidance_scale": 3.0},
        {"scheduler": "Heun", "num_inference_steps": 2, "controlnet_conditioning_scale": 0.4, "guidance_rescale": 0.7},
        {"init_image": square(200), "strength": 0.5, "num_inference_steps": 6, "negative_prompt": "a green square"},
    ]
    everyone = [staged(demo, **call) for call in calls]
    while going := [each for each in everyone if not each.done][:MOST]:
        stepper.step(going)
    for call, drawing in zip(calls, everyone, strict=True):
        assert relative(drawing.latents, draw(demo, **call)) < BOUND, call


def test_a_picture_is_the_same_to_the_last_level(demo: ControlNetPipeline, stepper: Stepper) -> None:
    """Decoded, as the pipeline decodes."""
    drawing = staged(demo)
    while not drawing.done:
        stepper.step([drawing])
    np.testing.assert_array_equal(stepper.decode(drawing.latents), draw(demo, output_type="np"))


def test_a_plan_that_drawings_left_serves_others(demo: ControlNetPipeline, stepper: Stepper) -> None:
    """Rows of those that have gone stay in the plan's memory; a newcomer's replace them."""
    first, second = staged(demo, seed=1), staged(demo, "a yellow heart", seed=2, image={"mask": square(10)})
    stepper.step([first, second])
    third = staged(demo, "a black ring", seed=4, image={"mask": square(70)})
    while not third.done:
        stepper.step([third, second] if not second.done else [third])
    assert relative(third.latents, draw(demo, "a black ring", seed=4, image={"mask": square(70)})) < BOUND
    assert relative(second.latents, draw(demo, "a yellow heart", seed=2, image={"mask": square(10)})) < BOUND


def test_alone_by_turns_then_together_then_alone(demo: ControlNetPipeline, stepper: Stepper) -> None:
    """Two of one layout, whose plan has room for one of them; and a third that comes when the first is done."""
    calls: list[dict[str, Any]] = [{"seed": seed, "scheduler": "UniPC", "num_inference_steps": 6} for seed in (1, 2, 3)]
    first, second, third = (staged(demo, **call) for call in calls)
    for group in ([first], [second], [first, second], [second], [first], [first, second], [first]):
        stepper.step(group)
    assert first.whole is not None
    assert second.whole is None
    while not first.done:
        stepper.step([first])
    while not third.done:
        stepper.step([third])
    while not second.done:
        stepper.step([second])
    for call, drawing in zip(calls, (first, second, third), strict=True):
        assert drawing.done
        assert relative(drawing.latents, draw(demo, **call)) < BOUND, call


def test_kinds_do_not_mix(demo: ControlNetPipeline, stepper: Stepper) -> None:
    with pytest.raises(ValueError, match="2 kinds"):
        stepper.step([staged(demo), staged(demo, guidance_scale=1.0)])


def test_what_is_not_finite_is_found_soon(demo: ControlNetPipeline, stepper: Stepper) -> None:
    """By one element of it, while nobody is there to take harm."""
    drawing = staged(demo, guidance_scale=3e38, num_inference_steps=20)

    def take_steps() -> None:
        for _ in range(3):
            stepper.step([drawing])

    with pytest.raises(NotFiniteError):
        take_steps()


def test_company_may_come_at_any_step(demo: ControlNetPipeline) -> None:
    """Whoever moves into a plan of its own leaves one open for each kind of step that it will take."""
    stepper = Stepper(demo.bundle, demo._executor)
    drawing = staged(demo, control_guidance_end=0.5)
    assert len(drawing.kinds) == 2
    stepper.step([drawing])
    assert drawing.whole is not None
    assert set(stepper._plans) == {(kind, 1) for kind in drawing.kinds}
    stepper.close()
