"""What is built for contenders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from controlrt.engines.build import BuildOptions
from controlrt.perf.models import prepare_model
from controlrt.perf.peers import builds
from controlrt.perf.peers.builds import Workshop
from controlrt.perf.peers.contenders import Peer, all_peers
from controlrt.perf.peers.specs import StableDiffusionCppSpec
from controlrt.perf.scenarios import Task
from controlrt.runtime.errors import ControlRTError

TASK = Task(
    name="single stream",
    kind="single-stream",
    width=512,
    height=512,
    batch=1,
    steps=(2,),
    sampler="DDIM",
    controls=("canny",),
)
BUNDLES = [peer for peer in all_peers("cpu", (), None) if peer.kind == "bundle"]


@pytest.mark.parametrize("peer", BUNDLES, ids=lambda peer: peer.name)
def test_every_bundle_is_asked_for_in_its_precision(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in 8 bits by one calibration, which is done once."""
    asked: list[BuildOptions] = []
    calibrations: list[Path] = []

    def build(options: BuildOptions, _: str) -> Any:
        asked.append(options)
        return SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(key="0" * 64)), cached=True)

    def collect(_: object, __: str, ___: object, statistics: Path) -> None:
        calibrations.append(statistics)
        statistics.parent.mkdir(parents=True)
        statistics.touch()

    monkeypatch.setattr(builds, "bench_directory", lambda: tmp_path)
    monkeypatch.setattr(builds, "build", build)
    monkeypatch.setattr(builds, "collect", collect)
    monkeypatch.setattr(Workshop, "_export", lambda *_: None)
    workshop = Workshop(prepare_model("demo"), batch="1", threads=1)
    for _ in range(2):
        workshop._build(peer, TASK)
    options = asked[-1]
    assert (options.backend, options.precision) == (peer.backend, peer.precision)
    if peer.precision in ("int8", "fp8"):
        assert options.quantization is not None
        assert options.quantization.precision == peer.precision
        assert [options.quantization.statistics] == calibrations
    else:
        assert options.quantization is None
        assert not calibrations


def test_stable_diffusion_cpp_is_given_one_controlnet_and_a_sampler_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is written or exported; the demo model is not of an architecture that it knows."""
    peer = Peer(name="cpp", kind="stable-diffusion.cpp", runtime="stable-diffusion.cpp", precision="bf16")
    workshop = Workshop(prepare_model("demo"), batch="1", threads=3)
    monkeypatch.setattr(Workshop, "_export", lambda *_: pytest.fail("nothing needs to be exported to refuse it"))
    for change, reason in (
        ({"controls": ("canny", "mask")}, "runs one ControlNet, not 2"),
        ({"controls": ()}, "runs one ControlNet, not 0"),
        ({"sampler": "UniPC"}, "not with UniPC"),
        ({}, "which this ControlNet is not for"),
    ):
        with pytest.raises(ControlRTError, match=reason):
            workshop.prepare(peer, dataclasses.replace(TASK, **change))
    monkeypatch.setattr(Workshop, "_eager_flops", lambda *_: 7)
    checkpoint = SimpleNamespace(model=Path("made/model"), controlnet=Path("made/control.safetensors"))
    monkeypatch.setattr(builds, "PublishedCheckpoint", lambda *_: checkpoint)
    prepared = workshop.prepare(peer, TASK)
    assert prepared.spec == StableDiffusionCppSpec(
        model="made/model", controlnet="made/control.safetensors", precision="bf16", threads=3
    )
    assert prepared.flops == 7
