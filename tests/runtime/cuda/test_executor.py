"""The CUDA runtime on a simulated GPU: what it computes, and what it asks of the device and when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from runtime.cuda.simulated import SimulatedDevice, SimulatedEngines, log_of

from controlled_calls import CALLS, CHANGES, PROMPT, draw, square
from controlrt.runtime import ControlNetPipeline, pipeline
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.cuda.memory import lower_bound, place
from controlrt.runtime.cuda.plan_memory import lifetimes
from controlrt.runtime.errors import ControlRTError, DeviceError, DeviceMemoryError
from controlrt.runtime.executors.cuda import CudaExecutor
from controlrt.runtime.plan import Layout, StepLayout, plan_denoising
from controlrt.runtime.stepping import Staged, Stepper

pytestmark = pytest.mark.bundle


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def simulated(
    demo_bundle: Path, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ControlNetPipeline]:
    monkeypatch.setattr(
        pipeline, "open_executor", lambda bundle, *_: CudaExecutor(bundle, device, SimulatedEngines(device))
    )
    with ControlNetPipeline(Bundle.open(demo_bundle, verify=False)) as pipe:
        yield pipe


@pytest.mark.parametrize("name", CALLS)
def test_draws_what_the_cpu_draws(demo: ControlNetPipeline, simulated: ControlNetPipeline, name: str) -> None:
    """The same programs run on the same bytes, so to the last bit; after another call has left its own there."""
    draw(simulated, "a green heart", seed=8)
    np.testing.assert_array_equal(draw(simulated, **CALLS[name]), draw(demo, **CALLS[name]))


def test_pictures_come_with_the_launch(demo: ControlNetPipeline, simulated: ControlNetPipeline) -> None:
    found = simulated(PROMPT, {"mask": square()}, num_inference_steps=2, seed=3, output_type="np")
    expected = demo(PROMPT, {"mask": square()}, num_inference_steps=2, seed=3, output_type="np")
    np.testing.assert_array_equal(found.images, expected.images)
    assert len(found.timings.steps) == 2
    assert all(seconds > 0 for seconds in (*found.timings.steps, found.timings.decode))


def test_a_call_of_a_known_layout_is_one_launch(simulated: ControlNetPipeline, device: SimulatedDevice) -> None:
    """Other prompts, hints, scales and seeds are other bytes: nothing is allocated, captured or bound again."""
    arguments: dict[str, Any] = {"output_type": "np"}
    draw(simulated, **arguments)
    for change in CHANGES:
        with log_of(device) as log:
            draw(simulated, **arguments, **change)
        own = [entry for entry in log if entry[0] not in ("launched", "activate")]
        *before, launch, wait = own
        assert (launch[0], wait[0]) == ("launch", "synchronize")
        assert {entry[0] for entry in before} <= {"copy", "run", "synchronize"}  # what a new prompt or hint needs
        assert not [entry for entry in before if entry[0] == "run" and "step" in entry[1]]
        ran = [entry[2] for entry in log if entry[:2] == ("launched", "run") and "step" in entry[2]]
        assert ran == ["controlnet.mask.step", "unet.step"] * 3
        assert [entry[:2] for entry in log[-3:-1]] == [("launched", "copy"), ("launched", "record")]


def test_what_is_captured_anew(simulated: ControlNetPipeline, device: SimulatedDevice) -> None:
    """Programs that run at other steps or on other rows than in the last four plans, and nothing else."""

    def captures(**call: Any) -> int:
        with log_of(device) as log:
            draw(simulated, **call)
        return sum(entry[0] == "begin_capture" for entry in log)

    reaches_zero = {"controlnet_conditioning_scale": {"mask": [1.0, 0.5, 0.0]}}
    assert captures() == 1
    assert captures(controlnet_conditioning_scale={"mask": [1.0, 0.5, 0.1]}) == 0
    assert captures(**reaches_zero) == 1
    assert captures(control_guidance_end=0.7) == 0  # the same steps
    assert captures(control_guidance_start=0.4) == 1
    assert captures(guess_mode=True) == 1
    assert [captures(), captures(**reaches_zero), captures(control_mode="controlnet")] == [0, 0, 0]
    assert captures(control_guidance_end=0.4) == 1  # in place of the one with the later start
    assert captures(control_guidance_start=0.4) == 1


def test_a_vae_of_tiles_is_launched_after_the_run(
    demo: ControlNetPipeline, demo_bundle: Path, device: SimulatedDevice
) -> None:
    """Its tiles are those of the host; here the picture is one."""
    bundle = Bundle.open(demo_bundle, verify=False)
    tiles = replace(bundle.manifest, profile=replace(bundle.manifest.profile, vae_tile=512))
    executor = CudaExecutor(bundle, device, SimulatedEngines(device))
    call = {"num_inference_steps": 2, "seed": 3, "output_type": "np"}
    with mock.patch.object(pipeline, "open_executor", return_value=executor):
        pipe = ControlNetPipeline(Bundle(bundle.path, tiles))
    with pipe:
        pipe("a star", **call)
        with log_of(device) as log:
            found = pipe(PROMPT, {"mask": square()}, **call)
    np.testing.assert_array_equal(found.images, demo(PROMPT, {"mask": square()}, **call).images)
    assert found.timings.decode > 0
    assert ("run", "vae_decoder") not in [entry[1:3] for entry in log if entry[0] == "launched"]
    assert [entry[:2] for entry in log].count(("run", "vae_decoder")) == 1


def test_the_same_prompt_and_hint_cost_one_launch(simulated: ControlNetPipeline, device: SimulatedDevice) -> None:
    draw(simulated)
    with log_of(device) as log:
        draw(simulated, seed=5)
    assert sum(entry[0] == "launch" for entry in log) == 1


def test_captured_equals_uncaptured(simulated: ControlNetPipeline, device: SimulatedDevice) -> None:
    captured = draw(simulated)
    (bound,) = simulated._bound.values()
    bound._queue(decode=False, history=False)
    device.synchronize()
    np.testing.assert_array_equal(bound._latents.host, captured)


def test_steps_of_several_drawings_are_one_launch_each(
    demo: ControlNetPipeline, simulated: ControlNetPipeline, device: SimulatedDevice
) -> None:
    """Step-level batching: state, rows and coefficients go up, one step runs, state comes down, in one graph."""
    stepper = Stepper(simulated.bundle, simulated._executor)
    host = Stepper(demo.bundle, demo._executor)
    calls: list[dict[str, Any]] = [{"num_inference_steps": 3}, {"num_inference_steps": 2, "scheduler": "Euler a"}]
    there, here = [[_staged(pipe, **call) for call in calls] for pipe in (simulated, demo)]
    for step in range(2):
        host.step(here)
        with log_of(device) as log:
            stepper.step(there)
        assert step == 0 or [entry[0] for entry in log if entry[0] in ("launch", "allocate", "run")] == ["launch"]
    for pair in zip(there, here, strict=True):
        np.testing.assert_array_equal(*(each.latents for each in pair))
    with log_of(device) as log:
        stepper.step(there[:1])
    assert not [entry for entry in log if entry[0] == "launched" and "vae" in str(entry)]
    host.step(here[:1])
    np.testing.assert_array_equal(there[0].latents, here[0].latents)
    stepper.close()


def _staged(pipe: ControlNetPipeline, **call: Any) -> Staged:
    drawing = pipe.prepare(PROMPT, {"mask": square()}, seed=3, **call)
    staged = Staged(pipe.plan(drawing.layout), drawing)
    pipe.fill(drawing, staged.plan, staged.buffers)
    return staged


def test_callback_sees_every_step_and_may_change_it(demo: ControlNetPipeline, simulated: ControlNetPipeline) -> None:
    def halve(_: Any, step: int, __: float, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["latents"].copy())
        return {"latents": given["latents"] / 2} if step == 1 else {}

    seen: list[NDArray[np.float32]] = []
    found = draw(simulated, callback_on_step_end=halve, output_type="np")
    on_the_gpu, seen = seen, []
    expected = draw(demo, callback_on_step_end=halve, output_type="np")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(on_the_gpu, seen)
    np.testing.assert_array_equal(draw(simulated), draw(demo))  # and the whole run is as before


def test_nothing_but_queued_work_in_a_capture(simulated: ControlNetPipeline, device: SimulatedDevice) -> None:
    """The device refuses allocations and waits inside a capture; what is captured are copies, runs and events."""
    draw(simulated, output_type="np")
    recorded = {entry[0] for graph in device.graphs.values() for entry, _ in graph}
    assert recorded == {"copy", "run", "record"}


def test_everything_is_given_back(simulated: ControlNetPipeline, device: SimulatedDevice) -> None:
    for steps in range(1, 8):  # more plans than are kept
        draw(simulated, num_inference_steps=steps)
    held = device.held()
    for steps in range(1, 8):
        draw(simulated, num_inference_steps=steps)
    assert device.held() == held
    simulated.close()
    simulated.close()
    assert device.held() == (0, 0, 0, 0)
    assert device.closed


BINDING = ("allocate", "allocate_host", "create_event", "run", "copy")
"""What binding a plan asks of a device, beside ``synchronize``."""


@pytest.mark.parametrize("watched", [False, True], ids=["at once", "by steps"])
@pytest.mark.parametrize("operation", [*BINDING, "begin_capture", "end_capture", "launch", "synchronize"])
def test_everything_is_given_back_after_an_error(
    simulated: ControlNetPipeline, device: SimulatedDevice, operation: str, watched: bool
) -> None:
    options: dict[str, Any] = {"callback_on_step_end": (lambda *_: None) if watched else None}
    draw(simulated, num_inference_steps=2)
    held = device.held()
    device.fails = operation
    with pytest.raises(DeviceError, match=operation):
        draw(simulated, **options)
    device.fails = None
    assert not device.capturing
    if operation in (*BINDING, "synchronize"):  # the plan was never there
        assert device.held() == held
    np.testing.assert_array_equal(draw(simulated, **options), draw(simulated))
    simulated.close()
    assert device.held() == (0, 0, 0, 0)


def test_engines_go_before_the_device_while_an_error_is_alive(
    simulated: ControlNetPipeline, device: SimulatedDevice
) -> None:
    draw(simulated, num_inference_steps=1)
    device.fails = "run"
    try:
        draw(simulated)
    except DeviceError:
        simulated.close()
    closed = [entry for entry in device.log if str(entry[0]).startswith("close")]
    assert closed[-2:] == [("close engines",), ("close device",)]
    assert {entry[1] for entry in closed[:-2]} >= {"unet.step", "controlnet.mask.step", "vae_decoder"}


def test_close_waits_for_a_call_and_refuses_its_callback(simulated: ControlNetPipeline) -> None:
    def close(*_: Any) -> None:
        simulated.close()

    with pytest.raises(ControlRTError, match="from a callback"):
        draw(simulated, callback_on_step_end=close)
    draw(simulated)


def test_an_interrupted_run_is_waited_for(simulated: ControlNetPipeline, device: SimulatedDevice) -> None:
    """Ctrl-C between launch and picture: the next call writes nothing into memory that the graph still reads."""
    first = draw(simulated)
    (bound,) = simulated._bound.values()
    device.fails = "synchronize"
    with pytest.raises(DeviceError):
        draw(simulated)
    device.fails = None
    assert bound._running
    with log_of(device) as log:
        np.testing.assert_array_equal(draw(simulated), first)
    waits = [entry[0] for entry in log if entry[0] in ("launch", "synchronize")]
    assert waits == ["synchronize", "launch", "synchronize"]


def test_a_plan_that_does_not_fit_takes_the_place_of_others(
    demo: ControlNetPipeline, simulated: ControlNetPipeline, device: SimulatedDevice
) -> None:
    for steps in (2, 4):
        draw(simulated, num_inference_steps=steps)
    device.total_bytes = sum(map(len, device.memory.values())) + 2**20
    np.testing.assert_array_equal(draw(simulated), draw(demo))
    assert len(simulated._bound) < 3


def test_out_of_memory_says_what_is_missing(simulated: ControlNetPipeline, device: SimulatedDevice) -> None:
    draw(simulated, num_inference_steps=2)
    simulated._bound.popitem()[1].close()
    device.total_bytes = device.total_bytes - device.free_bytes() + 2**20
    with pytest.raises(DeviceMemoryError, match=r"GPU 0: \d+ MiB are needed at once, and 1 MiB are free; draw"):
        draw(simulated)
    device.total_bytes = 2**34
    draw(simulated)


def test_programs_share_one_scratch_memory(
    demo: ControlNetPipeline, simulated: ControlNetPipeline, device: SimulatedDevice
) -> None:
    device.scratch_needed = 3 * 2**20
    np.testing.assert_array_equal(draw(simulated), draw(demo))
    (bound,) = simulated._bound.values()
    launches = [launch for step in bound._steps for _, launch in step] + bound._decoder
    assert len({launch._scratch for launch in launches}) == 1
    assert launches[0]._scratch in device.memory


LAYOUTS = {
    "one control": [StepLayout(controls=("mask",), guided=True)] * 5,
    "two controls": [StepLayout(controls=("canny", "mask"), guided=True)] * 5,
    "windows": [
        StepLayout(controls=controls, guided=guided)
        for controls, guided in [(("canny", "mask"), True), (("mask",), True), ((), True), ((), False)]
    ],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_a_plan(demo_bundle: Path, name: str) -> None:
    """Residuals share memory where two sets are never alive together; a plan takes at most 1.1 times the bound."""
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    layout = Layout(width=512, height=512, batch=2, draws=False, steps=tuple(LAYOUTS[name]))
    between = lifetimes(plan_denoising(manifest, layout))
    assert any(buffer.startswith("residual_") for buffer in between)
    assert not any(buffer.endswith(".zero") for buffer in between)
    assert place(between).total <= 1.1 * lower_bound(between)
