"""The command line of the benchmark, whose time a call took, and one short run of all of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from controlrt.perf.changes import command
from controlrt.perf.changes.meter import Meter
from controlrt.perf.changes.results import load
from controlrt.perf.changes.walk import CHANGES, SAME, Subject, walk
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.errors import UserError


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "30"], "--rounds"),
        (["--steps", "0"], "--steps"),
        (["--threads", "0"], "--threads"),
        (["--seed", "-1"], "--seed"),
        (["nowhere"], "no bundle"),
    ],
)
def test_what_cannot_be_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.run(parse(*argv))


@pytest.mark.bundle
def test_a_meter_tells_networks_from_the_host(demo_bundle: Path) -> None:
    subject = Subject(width=512, height=512, steps=2)
    with ControlNetPipeline.load(demo_bundle, verify=False) as pipeline:
        meter = Meter(pipeline)
        arguments = next(walk(subject, "canny", 9, rounds=0, seed=0)).arguments
        first, same = meter.call(arguments), meter.call(arguments)
        prompted = meter.call({**arguments, "prompt": "a blue moon"})
        without = meter.call({**arguments, "image": None, "control_layer_weights": None})
    assert first.networks > 0
    assert same.networks == 0
    assert prompted.networks > 0
    assert all(seconds >= 0 for seconds in same.stages.values())
    assert same.host < sum(same.steps)
    assert len(same.steps) == 2
    assert set(same.programs) == {"controlnet.canny.step", "unet.step"}
    assert 0 < sum(same.programs.values()) <= sum(same.steps)
    assert set(without.programs) == {"unet.step"}


@pytest.mark.slow
@pytest.mark.bundle
def test_a_short_run(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers mean nothing here."""
    output = tmp_path / "changes.json"
    code = command.run(parse(str(demo_bundle), "--rounds", "1", "--steps", "3", "--output", str(output)))
    report = load(output)
    assert [change.name for change in report.changes] == [SAME, *CHANGES]
    assert report.second is not None
    assert (report.second.first, report.second.second) == ("canny", "mask")
    assert report.second.own_seconds is not None
    assert code == (1 if "MISSED" in capsys.readouterr().out else 0)
