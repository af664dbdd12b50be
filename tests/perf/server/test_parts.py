"""The parts of the benchmark on a server that draws noise: real HTTP, real processes, no model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from controlrt.perf.server.capacity import measure_capacity
from controlrt.perf.server.expected import Expected
from controlrt.perf.server.mixed import measure_mixed
from controlrt.perf.server.overload import QUEUE, measure_overload
from controlrt.perf.server.serving import Served
from controlrt.perf.server.shutdown import LATER, measure_shutdown
from controlrt.perf.server.site import Site
from controlrt.perf.server.soak import growth, measure_soak
from controlrt.perf.server.visits import KINDS, read_events
from controlrt.perf.server.workload import Asked, Workload
from controlrt.runtime.errors import ControlRTError
from fake_service import fake_pictures

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parents[2]), *sys.path]))
    return Site(
        bundle=Path("fake"),
        workload=Workload(width=64, height=64, control="canny", seed=0),
        policy="shortest",
        baseline="batch",
        threads=1,
        batch=None,
        scratch=tmp_path,
        command=FAKE,
    )


def slow(site: Site, step_seconds: float) -> Site:
    return replace(site, command=(*FAKE, "--step-seconds", str(step_seconds)))


@pytest.fixture
def expected() -> Expected:
    asked = [Asked(seed=seed, steps=4, width=64, height=64, controls=("canny",)) for seed in range(5)]
    return Expected(asked=asked, pictures=[fake_pictures(each.seed, 1)[0] for each in asked], min_psnr_db=45.0)


def test_capacity_and_mixed_load(site: Site) -> None:
    """Both servers in turns, with the same requests at the same moments."""
    capacity = measure_capacity(site, requests=12, pairs=1)
    assert [block.policy for block in capacity.blocks] == ["shortest", "batch"]
    rates = capacity.requests_per_second
    assert capacity.ratio == rates["shortest"] / rates["batch"]
    mixed = measure_mixed(site, capacity=80.0, requests=12, pairs=2)
    assert [block.policy for block in mixed.blocks] == ["shortest", "batch", "batch", "shortest"]
    assert mixed.failed == 0
    assert [each.steps for each in mixed.by_steps] == [4, 20, 50]
    assert all(each.requests == 8 for each in mixed.by_steps)
    ours, theirs = (mixed.blocks[number].requests for number in (2, 3))
    assert [each.due for each in ours] == [each.due for each in theirs]


def test_overload_is_turned_away(site: Site) -> None:
    found = measure_overload(slow(site, 0.05), capacity=10.0, requests=60)
    assert found.done + found.rejected + found.expired == 60
    assert found.failed == 0
    assert found.rejected > 0
    assert found.expired > 0  # 50 steps take 2.5 s, and the deadline is 1.6 s
    assert found.deadline == pytest.approx(QUEUE / 10.0)
    assert found.rejection_p99 is not None


def test_a_soak_finds_nothing_wrong(site: Site, expected: Expected) -> None:
    found = measure_soak(site, expected, requests=120)
    assert (found.lost, found.mixed_up, found.left_over) == ((), (), 0)
    assert found.requests == sum(sum(ends.values()) for ends in found.outcomes.values()) == 120
    assert set(found.outcomes) == set(KINDS)
    assert found.compared > 80
    assert found.lowest_psnr_db == 200
    assert found.between_psnr_db < 20
    assert found.resident[0].resident_bytes > 0


def test_a_soak_finds_pictures_mixed_up(site: Site, expected: Expected) -> None:
    found = measure_soak(replace(site, command=(*FAKE, "--seed-offset", "1")), expected, requests=30)
    assert len(found.mixed_up) == found.compared > 0
    assert "nearest is seed" in found.mixed_up[0]
    assert not next(target for target in found.targets() if target.name == "soak: pictures mixed up").is_met


def test_sigterm_answers_what_was_accepted(site: Site) -> None:
    found = measure_shutdown(slow(site, 0.03), requests=6)
    assert found.accepted == found.answered == 6
    assert found.exit_code == 0
    assert sum(found.later.values()) == LATER
    assert set(found.later) <= {"0", "503"}
    assert all(target.is_met for target in found.targets())


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such bundle')")
    with (
        pytest.raises(ControlRTError, match="exit code 1: no such bundle"),
        Served(Path("x"), tmp_path / "log", command=command),
    ):
        pass


def test_growth_is_of_the_second_half() -> None:
    assert growth([50] * 20 + [100] * 20) == 0
    assert growth([0] * 20 + list(range(100, 120))) == pytest.approx(118.5 / 100.5 - 1)
    assert growth([]) is None
    assert growth([0] * 40) is None


def test_a_broken_stream_is_no_picture() -> None:
    whole = 'event: result\ndata: {"images": []}\n\n'
    assert read_events(whole) == [("result", {"images": []})]
    assert read_events(whole[:-12]) == [("result", None)]
    assert read_events('{"error": {"code": "queue_full"}}') == []
    assert read_events("ConnectionError('gone')") == []


def test_events_are_read() -> None:
    text = 'event: job\ndata: {"id": "1"}\n\n: keep-alive\n\nevent: result\ndata: {"seeds": [3]}\n\n'
    assert read_events(text) == [("job", {"id": "1"}), ("result", {"seeds": [3]})]
