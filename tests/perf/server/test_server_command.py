"""The command line of the server benchmark, and one very short run of all of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from controlrt.perf.server import command
from controlrt.perf.server.results import load
from controlrt.runtime.errors import UserError


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_parts_run_in_order_with_what_they_need() -> None:
    assert command._parts(parse()) == list(command.PARTS)
    assert command._parts(parse("--parts", "overload,mixed")) == ["capacity", "mixed", "overload"]
    assert command._parts(parse("--parts", "mixed", "--capacity", "1.5")) == ["mixed"]
    assert command._parts(parse("--parts", "soak")) == ["soak"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parts", "nonsense"], "unknown part"),
        (["--parts", ","], "--parts"),
        (["--soak", "0"], "--soak"),
        (["--capacity", "0"], "--capacity"),
        (["--policy", "batch"], "--baseline"),
    ],
)
def test_what_cannot_be_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command._parts(parse(*argv))


@pytest.mark.slow
@pytest.mark.bundle
def test_a_very_short_run_of_all_parts(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers mean nothing here; nothing may be lost, mixed up or left unanswered."""
    output = tmp_path / "server.json"
    few = ["--pairs", "1", "--requests", "3", "--capacity-requests", "3", "--rounds", "1", "--overload-requests", "12"]
    few += ["--shutdown-requests", "3", "--soak", "30", "--output", str(output)]
    command.run(parse(str(demo_bundle), *few))
    report = load(output)
    assert report.complete
    sound = {
        "mixed load: requests without a picture",
        "overload: requests lost",
        "soak: requests lost",
        "soak: pictures mixed up",
        "shutdown: accepted requests unanswered",
        "shutdown: exit code",
    }
    found = {target.name: target.is_met for target in report.targets()}
    assert {name: found[name] for name in sound} == dict.fromkeys(sound, True), capsys.readouterr().out
