"""Kernels are tuned once for a model, a call and a GPU, in the background."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import pytest

from controlrt.perf.machine import Machine, this_machine
from controlrt.perf.peers import compiling
from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.compiling import Tuned, Tuning, inductor_cache
from controlrt.perf.peers.process import PeerProcess
from controlrt.perf.peers.specs import EagerSpec

SCRIPT = """
import sys, time
import numpy as np
from controlrt.perf.peers.drawer import CallSeconds, Drawn
from controlrt.perf.peers.worker import serve

class Drawer:
    def draw(self, call, record):
        if sys.argv[1] == "broken":
            sys.exit("no compiler")
        open(sys.argv[2], "a").write(f"{call.steps} ")
        time.sleep(0.5)
        zeros = dict.fromkeys(("text", "hint", "timestep_table", "host", "decode", "total"), 0)
        return Drawn(pictures=np.zeros(1), latents=[], seconds=CallSeconds(steps=(), host_steps=(), **zeros))

serve(Drawer(), sys.stdin, sys.stdout)
"""
SPEC = EagerSpec(
    model="here",
    controlnets={},
    xl=False,
    precision="fp16",
    device="cuda",
    threads=1,
    channels_last=True,
    compile_mode="max-autotune",
)
CALL = Call(seed=0, width=64, height=64, steps=20, sampler="DDIM", guidance_scale=7.5, controls=())


@pytest.fixture
def tuned_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts in place of PyTorch; each writes the steps of its call into this file."""
    file = tmp_path / "steps"
    file.touch()

    def start(name: str, _: EagerSpec, log: Path, timeout: float) -> PeerProcess:
        return PeerProcess(name, [sys.executable, "-c", SCRIPT, name, str(file)], log, timeout)

    monkeypatch.setattr(compiling.PeerProcess, "start", start)
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path / "inductor"))
    return file


def tune(tmp_path: Path, machine: Machine, *names: str, spec: EagerSpec = SPEC, call: Call = CALL) -> Tuned:
    with Tuning(machine, tmp_path, timeout=60) as tuning:
        for name in names:
            tuning.start(name, spec, call)
        return tuning.wait()


def test_what_was_tuned_is_not_tuned_again(tmp_path: Path, tuned_steps: Path) -> None:
    machine = this_machine()
    first = tune(tmp_path, machine, "a")
    assert not first.failed
    assert first.seconds["a"] > 0.5
    assert tuned_steps.read_text() == "2 "
    again = tune(tmp_path, machine, "a", call=msgspec.structs.replace(CALL, seed=9, steps=50))
    assert again.seconds["a"] == pytest.approx(first.seconds["a"], abs=0.01)
    assert tuned_steps.read_text() == "2 "


def test_another_shape_mode_or_gpu_is_tuned_anew(tmp_path: Path, tuned_steps: Path) -> None:
    machine = this_machine()
    tune(tmp_path, machine, "a")
    tune(tmp_path, machine, "a", call=msgspec.structs.replace(CALL, width=128, steps=1))
    tune(tmp_path, machine, "a", spec=msgspec.structs.replace(SPEC, compile_mode="reduce-overhead"))
    tune(tmp_path, msgspec.structs.replace(machine, gpus=("another",)), "a")
    assert tuned_steps.read_text() == "2 1 2 2 "


def test_it_goes_on_in_the_background(tmp_path: Path, tuned_steps: Path) -> None:
    with Tuning(this_machine(), tmp_path, timeout=60) as tuning:
        tuning.start("a", SPEC, CALL)
        until = time.monotonic() + 30
        while not tuned_steps.read_text() and time.monotonic() < until:
            time.sleep(0.01)
        assert tuned_steps.read_text() == "2 "


def test_one_that_cannot_compile_says_so_and_is_tried_again(tmp_path: Path, tuned_steps: Path) -> None:
    for _ in range(2):
        found = tune(tmp_path, this_machine(), "broken")
        assert found.failed == {"broken": "the worker of broken ended with exit code 1: no compiler"}
        assert not found.seconds
    assert set(tune(tmp_path, this_machine(), "a").seconds) == {"a"}
    assert tuned_steps.read_text() == "2 "


def test_the_environment_says_where_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert inductor_cache() == tmp_path / "bench" / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kernels")
    assert inductor_cache() == Path("/kernels")
