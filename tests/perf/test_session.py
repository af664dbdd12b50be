"""A session with scripts in place of contenders: who takes turns, and what becomes of those that fail."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from controlrt.perf.peers.process import PeerProcess
from controlrt.perf.scenarios import Task
from controlrt.perf.session import Session

SCRIPT = """
import sys, time
import numpy as np
from controlrt.perf.peers.drawer import CallSeconds, Drawn
from controlrt.perf.peers.worker import serve

name, log, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
if left < 0:
    print("noise", file=sys.stderr)
    sys.exit("cannot load")

class Drawer:
    def draw(self, call, record):
        global left
        if left == 0:
            sys.exit("no more pictures")
        left -= 1
        with open(log, "a") as file:
            file.write(f"{name}{call.seed}{'!' if record else ''} ")
        if left == 1000:
            time.sleep(60)
        zeros = dict.fromkeys(("text", "hint", "timestep_table", "decode"), 0)
        seconds = CallSeconds(steps=(1,), host_steps=(0,), host=0, total=call.seed + 1, **zeros)
        return Drawn(pictures=np.zeros((1, 8, 8, 3), np.float32), latents=[np.zeros(4)], seconds=seconds)

serve(Drawer(), sys.stdin, sys.stdout)
"""
TASK = Task(
    name="single stream", kind="single-stream", width=64, height=64, steps=(1,), sampler="DDIM", controls=("canny",)
)


def session(
    tmp_path: Path, warm_ups: int = 0, timeout: float | None = None, early: Sequence[str] = (), **pictures: int
) -> Session:
    """Contenders that end after so many pictures; fewer than none: that do not load."""

    def start(name: str) -> PeerProcess:
        command = [sys.executable, "-c", SCRIPT, name, str(tmp_path / "turns"), str(pictures[name])]
        return PeerProcess(name, command, tmp_path / f"{name}.log", timeout)

    return Session(task=TASK, start=start, rounds=2, warm_ups=warm_ups, directory=tmp_path, early=early)


def together(_: str, others: Sequence[str]) -> list[list[str]]:
    return [list(others)]


def totals(found: Session) -> list[dict[str, list[float]]]:
    return [{name: [call.total for call in calls] for name, calls in group.items()} for group in found.groups]


def test_contenders_take_turns_back_and_forth(tmp_path: Path) -> None:
    found = session(tmp_path, warm_ups=1, a=9, b=9)
    found.measure(["a", "b"], together)
    turns = (tmp_path / "turns").read_text()
    assert turns == "a1000002! b1000002! a1000001 b1000001 b0 a0 a1 b1 "
    assert found.reference == "a"
    assert totals(found) == [{"a": [1, 2], "b": [1, 2]}]
    assert not found.failed
    for name in "ab":
        started = found.started[name]
        assert started.cold_start_seconds > started.load_seconds > 0
        assert started.first_request_seconds == 1000003
        assert found.answers[name].peak_host_bytes > 2**20
        with np.load(found.recorded(name)) as recorded:
            assert recorded["pictures"].shape == (1, 8, 8, 3)


def test_the_reference_runs_beside_every_group(tmp_path: Path) -> None:
    found = session(tmp_path, a=9, b=9, c=9)
    found.measure(["a", "b", "c"], lambda _, others: [[name] for name in others])
    assert totals(found) == [{"a": [1, 2], "b": [1, 2]}, {"a": [1, 2], "c": [1, 2]}]


def test_those_that_take_long_to_start_do_so_while_others_load(tmp_path: Path) -> None:
    """c waits for its first picture until b has drawn its own; turns are as they always are."""
    found = session(tmp_path, early=["c"], a=9, b=9, c=9)
    start, order = found.start, []

    def counted(name: str) -> PeerProcess:
        order.append(name)
        return start(name)

    found.start = counted
    found.measure(["a", "b", "c"], together)
    assert order == ["a", "c", "b"]
    assert (tmp_path / "turns").read_text().endswith(" a0 b0 c0 c1 b1 a1 ")
    assert totals(found) == [{"a": [1, 2], "b": [1, 2], "c": [1, 2]}]
    assert found.started["c"].cold_start_seconds > found.started["c"].load_seconds > 0


def test_answers_that_wait_are_all_heard(tmp_path: Path) -> None:
    """Both of the first two are there before anybody listens, and times are those of the worker."""
    command = [sys.executable, "-c", SCRIPT, "a", str(tmp_path / "turns"), "9"]
    with PeerProcess("a", command, tmp_path / "a.log", timeout=20) as worker:
        worker.begin(TASK.calls(0)[0], tmp_path / "a.npz")
        until = time.monotonic() + 20
        while not (tmp_path / "a.npz").exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(1)
        listened = time.monotonic() - worker.started
        worker.load()
        assert worker.load_seconds <= worker.cold_start_seconds < listened
        assert worker.first_request_seconds == 1
        assert worker.draw(TASK.calls(1)[0]).total == 2


def test_many_files_may_be_open(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < 1100:  # more than select takes
            opened.append(os.open(os.devnull, os.O_RDONLY))
        found = session(tmp_path, timeout=60, a=9)
        found.measure(["a"], together)
    finally:
        for each in opened:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not found.failed
    assert totals(found) == [{"a": [1, 2]}]


def test_one_that_fails_costs_no_other(tmp_path: Path) -> None:
    found = session(tmp_path, a=9, b=2, c=-1, d=9)
    found.measure(["a", "b", "c", "d"], together)
    assert totals(found) == [{"a": [1, 2], "d": [1, 2]}]
    assert found.failed == {
        "b": "the worker of b ended with exit code 1: no more pictures",
        "c": "the worker of c ended with exit code 1: cannot load",
    }


def test_the_next_one_stands_in_for_a_reference_that_does_not_load(tmp_path: Path) -> None:
    found = session(tmp_path, a=-1, b=9, c=9)
    found.measure(["a", "b", "c"], together)
    assert found.reference == "b"
    assert totals(found) == [{"b": [1, 2], "c": [1, 2]}]
    nobody = session(tmp_path, a=-1)
    nobody.measure(["a"], together)
    assert (nobody.reference, nobody.groups) == (None, [])


def test_groups_after_a_reference_that_failed_say_so(tmp_path: Path) -> None:
    found = session(tmp_path, a=2, b=9, c=9)
    found.measure(["a", "b", "c"], lambda _, others: [[name] for name in others])
    assert totals(found) == [{"b": [1, 2]}]
    assert found.failed["c"].startswith("a, which runs beside all others, failed: the worker of a ended")


def test_one_at_a_time(tmp_path: Path) -> None:
    """Every contender is loaded anew in each round, when the one before has ended, and none is beside it."""
    found = session(tmp_path, warm_ups=1, a=9, b=9, c=-1)
    start, running, most = found.start, [], []

    def counted(name: str) -> PeerProcess:
        process = start(name)
        running.append(process)
        most.append([each.variant for each in running if each._process.poll() is None])
        return process

    found.start = counted
    found.measure_one_at_a_time(["c", "a", "b"])
    assert (tmp_path / "turns").read_text() == "a1000002! a0 b1000002! b0 b1000002! b1 a1000002! a1 "
    assert most == [["c"], ["a"], ["b"], ["b"], ["a"]]
    assert found.reference == "a"
    assert totals(found) == [{"a": [1, 2], "b": [1, 2]}]
    assert found.failed == {"c": "the worker of c ended with exit code 1: cannot load"}
    assert found.started["a"].first_request_seconds == 1000003
    assert found.answers.keys() == {"a", "b"}


def test_one_at_a_time_and_one_that_fails_later(tmp_path: Path) -> None:
    """A process of its own each time: it fails in the second round alone, and what it drew before is not reported."""
    found = session(tmp_path, a=9, b=9)
    start, begun = found.start, []

    def worse(name: str) -> PeerProcess:
        begun.append(name)
        left = "1" if begun.count("a") == 2 and name == "a" else "9"
        command = [sys.executable, "-c", SCRIPT, name, str(tmp_path / "turns"), left]
        return PeerProcess(name, command, tmp_path / f"{name}.log") if left == "1" else start(name)

    found.start = worse
    found.measure_one_at_a_time(["a", "b"])
    assert found.reference == "b"
    assert totals(found) == [{"b": [1, 2]}]
    assert found.failed["a"].endswith("no more pictures")


@pytest.mark.timeout(60)
def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    found = session(tmp_path, timeout=5, a=9, b=1001)
    found.measure(["a", "b"], together)
    assert found.failed == {"b": "the worker of b did not answer within 5 s; --timeout gives it longer"}
