"""Where steps begin and end, on a GPU whose clock is made up: nothing waits for it before the picture is there."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from controlrt.perf.peers import eager
from controlrt.perf.peers.drawer import CallSeconds


class Gpu:
    """Its work takes a second for every millisecond of the host's; it counts what is waited for."""

    def __init__(self) -> None:
        self.done = 0.0
        self.waits = 0

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.done)
        event.elapsed_time = lambda later: 1000 * (later.at - event.at)
        return event

    def work(self, seconds: float) -> None:
        self.done += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The host's time, in its one element; it goes on by itself by a microsecond a look."""
    now, ticks = [100.0], itertools.count()
    monkeypatch.setattr(eager, "perf_counter", lambda: now[0] + 1e-6 * next(ticks))
    return now


def drawn(boundaries: eager._Boundaries, gpu: Gpu, clock: list[float], steps: int) -> CallSeconds:
    """As diffusers would: text and hint, then a ControlNet, a UNet and a sampler for every step, then the decoder."""

    def launch(on_host: float, on_gpu: float) -> None:
        clock[0] += on_host
        gpu.work(on_gpu)

    boundaries.clear()
    started = clock[0]
    boundaries.stage("text", launch)(0.001, 0.5)
    boundaries.stage("hint", launch)(0.002, 0.25)
    network = boundaries.network(launch)
    for _ in range(steps):
        network(0.003, 1.0)
        network(0.004, 2.0)
        launch(0.005, 0.125)
        boundaries.end_step()
    launch(0.006, 0.75)
    clock[0] = started + max(clock[0] - started, gpu.done)  # the picture is copied to the host
    return boundaries.seconds(clock[0] - started)


def test_a_gpu_s_steps_are_by_its_own_clock(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(eager.torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(eager.torch.cuda, "synchronize", lambda: pytest.fail("the timed call waited"))
    seconds = drawn(eager._Boundaries(on_gpu=True), gpu, clock, steps=3)
    assert seconds.steps == pytest.approx((3.125, 3.125, 3.125))
    assert (seconds.text, seconds.hint) == (pytest.approx(0.5), pytest.approx(0.25))
    assert seconds.decode == pytest.approx(0.75)
    assert seconds.total == pytest.approx(0.75 + 3 * 3.125 + 0.75)
    assert seconds.host_steps == pytest.approx((0.012, 0.012, 0.012), abs=1e-4)
    assert seconds.host == pytest.approx(0.036, abs=3e-4)


def test_a_cpu_s_steps_are_by_the_host_s(clock: list[float]) -> None:
    seconds = drawn(eager._Boundaries(on_gpu=False), Gpu(), clock, steps=2)
    assert seconds.steps == pytest.approx((0.012, 0.012), abs=1e-4)
    assert seconds.host_steps == pytest.approx((0.005, 0.005), abs=1e-4)  # the sampler
    assert (seconds.text, seconds.hint) == (pytest.approx(0.001, abs=1e-4), pytest.approx(0.002, abs=1e-4))
    assert seconds.decode > 0.006 - 1e-4


def test_nothing_of_a_call_is_left_for_the_next(clock: list[float]) -> None:
    boundaries = eager._Boundaries(on_gpu=False)
    first, second = (drawn(boundaries, Gpu(), clock, steps) for steps in (3, 1))
    assert (len(first.steps), len(second.steps)) == (3, 1)
    assert second.text == pytest.approx(0.001, abs=1e-4)


@pytest.mark.parametrize(("precision", "rounded"), [("fp32", False), ("fp16", True)])
def test_only_the_measure_of_all_pictures_is_exact(
    precision: str, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = eager.torch
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    before = torch.get_float32_matmul_precision()
    try:
        eager._tune(precision, None)
        assert torch.backends.cudnn.allow_tf32 is rounded
        assert (torch.get_float32_matmul_precision() == "high") is rounded
        assert torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(before)
