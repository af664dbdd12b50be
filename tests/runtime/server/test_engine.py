"""The engine on the demo bundle, in this process."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from controlled_calls import PROMPT, square
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.errors import DeviceError, DeviceMemoryError
from controlrt.runtime.server import engine
from controlrt.runtime.server.engine import Engine
from controlrt.runtime.server.messages import (
    Accepted,
    Advanced,
    Broken,
    Failed,
    Finished,
    Incoming,
    Refused,
    Stepped,
    Submit,
)

pytestmark = pytest.mark.bundle


class Running:
    """An engine, and what it says."""

    def __init__(self, demo: ControlNetPipeline, **options: Any) -> None:
        self.said: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        self.engine = Engine(demo.bundle, self.said.put, **options)

    def submit(
        self,
        name: str,
        *,
        deadline: float | None = None,
        previews: bool = False,
        alone: bool = False,
        watched: bool = True,
        **changes: Any,
    ) -> None:
        arguments = {"prompt": PROMPT, "image": {"mask": square()}, "num_inference_steps": 2, "seed": 3, **changes}
        self.engine.submit(
            Submit(id=name, arguments=arguments, deadline=deadline, previews=previews, alone=alone, watched=watched)
        )

    def until(self, *names: str) -> list[Incoming]:
        """Everything it says until these are finished."""
        left, heard = set(names), []
        while left:
            heard.append(self.said.get(timeout=60))
            if isinstance(heard[-1], Finished | Failed | Refused):
                left.discard(heard[-1].id)
        return heard


def pictures_of_steps(heard: list[Incoming]) -> list[int]:
    """How many pictures each step was for that was told of."""
    return [pictures for each in heard if isinstance(each, Stepped) for pictures, _ in each.steps]


@pytest.fixture(scope="module")
def shared(demo: ControlNetPipeline) -> Iterator[Running]:
    running = Running(demo, batch=4)
    with running.engine:
        yield running


@pytest.mark.parametrize("watched", [True, False])
def test_words_say_whether_anybody_watches(shared: Running, *, watched: bool) -> None:
    shared.submit("a", watched=watched, previews=True)  # so that there is a word on each step
    words = [each for each in shared.until("a") if isinstance(each, Accepted | Advanced)]
    assert [each.watched for each in words] == [watched] * 3  # accepted, begun, one step of two


def test_short_requests_overtake_and_share_steps(demo: ControlNetPipeline, shared: Running) -> None:
    shared.submit("long", num_inference_steps=9, previews=True)
    while not isinstance(shared.said.get(timeout=60), Advanced):
        pass
    shared.submit("short", scheduler="Euler a", seed=5)
    heard = shared.until("long", "short")
    finished = [each for each in heard if isinstance(each, Finished)]
    assert [each.id for each in finished] == ["short", "long"]
    assert max(pictures_of_steps(heard)) == 2
    for each, call in zip(
        finished,
        ({"scheduler": "Euler a", "seed": 5, "num_inference_steps": 2}, {"num_inference_steps": 9, "seed": 3}),
        strict=True,
    ):
        alone = np.asarray(demo(PROMPT, {"mask": square()}, **call).images[0], np.int16)
        assert np.abs(alone - each.pictures[0]).max() <= 1  # the batch may round otherwise
        assert set(each.seconds) == {"queued", "steps", "decode", "total"}
        assert each.seeds == (call["seed"],)
    previews = [
        each.previews[0] for each in heard if isinstance(each, Advanced) and each.id == "long" and each.previews
    ]
    assert {each.shape for each in previews} == {(64, 64, 3)}
    picture = finished[1].pictures[0].reshape(64, 8, 64, 8, 3).mean(axis=(1, 3))
    likeness = [np.corrcoef(each.ravel(), picture.ravel())[0, 1] for each in previews]
    assert likeness[-1] > 0.85  # a linear map of demo latents reaches 0.93
    assert likeness[-1] > likeness[0]


def test_whole_requests_wait_for_the_batch_before_them(demo: ControlNetPipeline) -> None:
    """Those of the same steps go together, and a short one that comes later waits for all of theirs."""
    running = Running(demo, batch=4, policy="batch")
    with running.engine:
        running.submit("first", num_inference_steps=8, previews=True)  # which keeps the device busy
        while not isinstance(running.said.get(timeout=60), Advanced):
            pass
        running.submit("long", num_inference_steps=3)
        running.submit("short", seed=5)
        running.submit("other", num_inference_steps=3, scheduler="Euler", seed=7)
        heard = running.until("first", "long", "short", "other")
    finished = [each for each in heard if isinstance(each, Finished)]
    assert [each.id for each in finished] == ["first", "long", "other", "short"]
    assert pictures_of_steps(heard)[-5:] == [2, 2, 2, 1, 1]
    alone = np.asarray(demo(PROMPT, {"mask": square()}, num_inference_steps=3, seed=7, scheduler="Euler").images[0])
    assert np.abs(alone.astype(np.int16) - finished[2].pictures[0]).max() <= 1


@pytest.mark.parametrize(
    ("seconds", "previews", "told"),
    [(0.0, False, [0, 1, 2, 3]), (600.0, False, [0]), (600.0, True, [0, 1, 2, 3])],
)
def test_how_far_a_request_is_is_said_now_and_then(
    shared: Running, monkeypatch: pytest.MonkeyPatch, seconds: float, previews: bool, told: list[int]
) -> None:
    """At every step to who sees previews; the steps themselves are all told, in the end."""
    monkeypatch.setattr(engine, "TELL_SECONDS", seconds)
    shared.submit("a", num_inference_steps=4, previews=previews)
    heard = shared.until("a")
    assert [each.step for each in heard if isinstance(each, Advanced)] == told
    assert pictures_of_steps(heard) == [1] * 4


def test_steps_of_what_was_cancelled_are_told(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TELL_SECONDS", 600.0)
    shared.submit("a", num_inference_steps=500)
    while not (task := shared.engine._tasks["a"]).staged or task.staged.step < 2:
        time.sleep(0.01)
    shared.engine.cancel("a")
    shared.until("a")
    assert len(pictures_of_steps([shared.said.get(timeout=60)])) >= 2


def test_the_next_is_encoded_when_all_before_it_are_cancelled(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and nothing else happens: the one that no room was left for must be looked at again."""
    monkeypatch.setattr(engine, "AHEAD", 1)
    for name, steps in (("runs", 500), ("encoded", 501), ("waits", 502)):
        shared.submit(name, num_inference_steps=steps, alone=True)
    while [task.submit.id for task in shared.engine._ready] != ["runs", "encoded"]:
        time.sleep(0.01)
    with shared.engine._lock:
        shared.engine.cancel("runs")
        shared.engine.cancel("encoded")
    heard = shared.until("runs", "encoded")
    while not any(isinstance(each, Advanced) and each.id == "waits" for each in heard):
        heard.append(shared.said.get(timeout=10))
    shared.engine.cancel("waits")
    shared.until("waits")


def test_refusals_name_the_argument(shared: Running) -> None:
    shared.submit("steps", num_inference_steps=0)
    shared.submit("control", image={"depth": square()})
    wrong = {
        "width": {"width": 100},
        "image": {"image": {"mask": square().resize((64, 64))}},
        "init_image": {"init_image": square().resize((64, 64))},
        "scheduler": {"scheduler": "Eular"},
        "control_mode": {"control_mode": "strong"},
        "controlnet_conditioning_scale": {"controlnet_conditioning_scale": {"pose": 1.0}},
        "control_region": {"control_region": square().resize((64, 64))},
        "height": {"height": 1024},
        "prompt_syntax": {"prompt_syntax": "html"},
    }
    for name, arguments in wrong.items():
        shared.submit(name, **arguments)
    said = {each.id: each for each in shared.until("steps", "control", *wrong) if isinstance(each, Refused)}
    assert said["steps"].parameter == "num_inference_steps"
    assert said["control"].parameter == "image"
    assert "unknown control 'depth'" in said["control"].message
    assert {name: said[name].parameter for name in wrong} == {name: name for name in wrong}


def test_whatever_arguments_do_they_are_refused(shared: Running) -> None:
    """No request may end the engine."""
    shared.submit("betas", scheduler={"_class_name": "EulerDiscreteScheduler", "trained_betas": ["x", "y"]})
    shared.submit("unknown", no_such_argument=1)
    said = [each for each in shared.until("betas", "unknown") if isinstance(each, Refused)]
    assert {each.id for each in said} == {"betas", "unknown"}


def test_infinities_stay_with_the_request_that_brings_them(demo: ControlNetPipeline, shared: Running) -> None:
    """It fails beside another, and by itself again; the other is told apart, and drawn."""
    shared.submit("huge", guidance_scale=3e38, num_inference_steps=3)
    shared.submit("sane", num_inference_steps=3)
    said = {each.id: each for each in shared.until("huge", "sane") if isinstance(each, Finished | Failed)}
    assert isinstance(said["huge"], Failed)
    assert "not finite" in said["huge"].message
    if isinstance(said["sane"], Failed):  # it was in company: the service tries it again
        shared.submit("sane again", num_inference_steps=3, alone=True)
        said["sane"] = next(each for each in shared.until("sane again") if isinstance(each, Finished))
    expected = np.asarray(demo(PROMPT, {"mask": square()}, num_inference_steps=3, seed=3).images[0], np.int16)
    assert np.abs(expected - said["sane"].pictures[0]).max() <= 1


def test_a_full_memory_fails_its_requests_alone(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step = shared.engine._stepper.step

    def full(drawings: Any) -> None:
        if any(each.drawing.seed == 666 for each in drawings):
            raise DeviceMemoryError("GPU 0", 2**40, 2**30)
        step(drawings)

    monkeypatch.setattr(shared.engine._stepper, "step", full)
    shared.submit("large", seed=666)
    failed = shared.until("large")[-1]
    assert isinstance(failed, Failed)
    assert "out of memory" in failed.message
    shared.submit("small")
    assert any(isinstance(each, Finished) for each in shared.until("small"))


def test_cancelled_and_late_requests_stop_at_a_step(shared: Running) -> None:
    shared.submit("late", deadline=time.monotonic() + 0.5, num_inference_steps=500)
    shared.submit("unwanted", num_inference_steps=500)
    shared.submit("past", deadline=time.monotonic() - 1)
    shared.engine.cancel("unwanted")
    shared.engine.cancel("nobody")
    failed = {each.id: each for each in shared.until("late", "unwanted", "past") if isinstance(each, Failed)}
    assert {name: each.reason for name, each in failed.items()} == {
        "late": "deadline",
        "unwanted": "cancelled",
        "past": "deadline",
    }
    assert "of 500" in failed["late"].message
    shared.submit("next")
    assert isinstance(shared.until("next")[-1], Finished)


def test_a_request_by_itself_stops_at_a_step_too(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing new comes it takes its steps one after another, and its time may be over among them."""
    monkeypatch.setattr(shared.engine, "_least_picture_seconds", 1e-9)
    count = shared.engine._count
    monkeypatch.setattr(shared.engine, "_count", lambda *_: None)  # which would learn what a step takes
    shared.submit("late", deadline=time.monotonic() + 2.0, num_inference_steps=500)
    failed = shared.until("late")[-1]
    monkeypatch.setattr(shared.engine, "_count", count)
    assert isinstance(failed, Failed)
    assert failed.reason == "deadline"
    found = re.search(r"at (\d+) of 500", failed.message)
    assert found is not None
    assert 0 < int(found[1]) < 500


def test_a_failing_step_fails_its_requests_alone(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step = shared.engine._stepper.step

    def poisoned(drawings: Any) -> None:
        if any(each.drawing.seed == 666 for each in drawings):
            raise RuntimeError("a kernel failed")
        step(drawings)

    monkeypatch.setattr(shared.engine._stepper, "step", poisoned)
    shared.submit("poison", seed=666)
    shared.submit("other", alone=True)
    said = {each.id: each for each in shared.until("poison", "other") if isinstance(each, Finished | Failed)}
    assert isinstance(said["other"], Finished)
    assert isinstance(said["poison"], Failed)
    assert (said["poison"].reason, said["poison"].message) == ("engine", "a kernel failed")


def test_a_failing_decoder_fails_no_request_that_is_finished(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, decoded = shared.engine, []
    busy, gate = threading.Event(), threading.Event()
    step, decode = engine._stepper.step, engine._stepper.decode

    def gated(drawings: Any) -> None:
        busy.set()
        gate.wait(60)
        step(drawings)

    def failing(latents: Any) -> Any:
        decoded.append(latents)
        if len(decoded) == 2:
            raise RuntimeError("a kernel failed")
        return decode(latents)

    monkeypatch.setattr(engine._stepper, "step", gated)
    monkeypatch.setattr(engine._stepper, "decode", failing)
    shared.submit("busy", num_inference_steps=6)
    busy.wait(60)
    shared.submit("one")
    shared.submit("other")
    while len(engine._ready) < 3:
        time.sleep(0.01)
    gate.set()
    said = [each for each in shared.until("busy", "one", "other") if isinstance(each, Finished | Failed)]
    assert [(each.id, type(each)) for each in said] == [("one", Finished), ("other", Failed), ("busy", Failed)]
    shared.submit("next")
    assert isinstance(shared.until("next")[-1], Finished)


def test_those_to_be_drawn_alone_have_no_company(shared: Running) -> None:
    for number in range(3):
        shared.submit(f"alone {number}", alone=True, seed=number)
    said = shared.until("alone 0", "alone 1", "alone 2")
    assert pictures_of_steps(said) == [1] * 6


def test_several_pictures_of_one_request(demo: ControlNetPipeline, shared: Running) -> None:
    shared.submit("three", num_images_per_prompt=3, seed=[4, 5, 6])
    finished = shared.until("three")[-1]
    assert isinstance(finished, Finished)
    assert finished.seeds == (4, 5, 6)
    expected = demo(PROMPT, {"mask": square()}, num_inference_steps=2, num_images_per_prompt=3, seed=[4, 5, 6]).images
    np.testing.assert_array_equal(np.stack(finished.pictures), np.stack([np.asarray(each) for each in expected]))


def test_a_lost_device_breaks_the_engine(demo: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Any) -> None:
        raise DeviceError("the GPU has fallen off the bus")

    running = Running(demo)
    with running.engine:
        monkeypatch.setattr(running.engine._stepper, "step", lost)
        running.submit("any")
        said = [running.said.get(timeout=60) for _ in range(3)]
    assert [type(each) for each in said[:2]] == [Accepted, Advanced]
    assert said[2] == Broken("DeviceError: the GPU has fallen off the bus")
