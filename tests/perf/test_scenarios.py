"""Scenarios from the command line's words, and the calls that they are made of."""

from __future__ import annotations

import pytest

from controlrt.perf.scenarios import Task, parse_size, plan_tasks
from controlrt.runtime.errors import UserError

SINGLE = Task(
    name="single stream",
    kind="single-stream",
    width=512,
    height=512,
    steps=(20,),
    sampler="DDIM",
    controls=("canny",),
)
CONTROLS = ("canny", "mask")


def test_the_single_stream_comes_first_and_alone() -> None:
    assert plan_tasks(SINGLE, known_controls=CONTROLS) == [SINGLE]


def test_every_scenario_varies_one_thing() -> None:
    tasks = plan_tasks(
        SINGLE,
        known_controls=CONTROLS,
        batches="1,4",
        steps_mix="10,20",
        sweeps=["resolution=256x256,512x768", "steps=5", "batch=2", "controls=1,2"],
    )
    found = {task.name: task for task in tasks}
    assert list(found) == [
        *("single stream", "offline, batch 1", "offline, batch 4", "mixed steps", "sweep, 256x256", "sweep, 512x768"),
        *("sweep, 5 steps", "sweep, batch 2", "sweep, 1 ControlNet", "sweep, 2 ControlNets"),
    ]
    assert found["offline, batch 4"].batch == 4
    assert found["mixed steps"].steps == (10, 20)
    wide = found["sweep, 512x768"]
    assert (wide.width, wide.height, wide.axis, wide.value) == (512, 768, "resolution", 512 * 768)
    assert (found["sweep, 5 steps"].steps, found["sweep, 5 steps"].value) == ((5,), 5)
    assert found["sweep, 2 ControlNets"].controls == CONTROLS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batches": "1,x"}, "--batches is '1,x', but must be whole numbers"),
        ({"steps_mix": "0"}, "--steps-mix is '0', but must be whole numbers of at least 1"),
        ({"batches": "2,2"}, "offline, batch 2 is asked for twice"),
        ({"sweeps": ["steps"]}, "is not AXIS=VALUE"),
        ({"sweeps": ["size=1"]}, "unknown axis of --sweep 'size'; known: resolution, batch, steps, controls"),
        ({"sweeps": ["controls=3"]}, "at most 2: there are canny, mask"),
        ({"sweeps": ["resolution=100x100"]}, "not a multiple of 64"),
    ],
)
def test_mistakes_are_told(asked: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_tasks(SINGLE, known_controls=CONTROLS, **asked)  # type: ignore[arg-type]


def test_one_size_is_one_size() -> None:
    assert parse_size("512x768") == (512, 768)
    for text in ("256-512x512", "256x256,512x512"):
        with pytest.raises(UserError, match="one size, such as 512x512"):
            parse_size(text)


def test_no_picture_is_drawn_twice() -> None:
    """Warm-ups and the first request, rounds -2 and -1, included."""
    task = plan_tasks(SINGLE, known_controls=CONTROLS, steps_mix="4,8")[1]
    calls = [call for number in range(-2, 5) for call in task.calls(number)]
    assert [call.steps for call in calls] == [4, 8] * 7
    seeds = [seed for call in calls for seed in call.seeds]
    assert len(set(seeds)) == len(seeds)
