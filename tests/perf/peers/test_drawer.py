"""Seconds by stage, and which program counts for which."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from controlrt.perf.peers.bundle import stages
from controlrt.perf.peers.drawer import Stopwatch
from controlrt.runtime.bundle import read_manifest


def test_a_stopwatch_adds_up_also_where_work_fails() -> None:
    watch = Stopwatch()
    assert watch.timed("text", lambda number: time.sleep(0.01) or number)(3) == 3
    with pytest.raises(ZeroDivisionError):
        watch.timed("text", lambda: time.sleep(0.01) or 1 / 0)()
    assert 0.02 <= watch.of("text") < 0.2
    assert watch.of("hint") == 0


@pytest.mark.bundle
def test_everything_before_the_loop_counts_for_a_stage(demo_bundle: Path) -> None:
    found = stages(read_manifest(demo_bundle))
    assert found["text_encoder"] == found["unet.prompt"] == found["controlnet.mask.prompt"] == "text"
    assert found["unet.timestep"] == "timestep_table"
    assert found["controlnet.canny.hint"] == "hint"
    assert not {"unet.step", "vae_decoder"} & found.keys()
