"""The line protocol from both sides, with fakes in place of models."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controlrt.perf.child_process import WorkerError
from controlrt.perf.memory import peak_memory
from controlrt.perf.worker import serve
from controlrt.perf.worker_process import WorkerProcess

SERVED = """
import sys
import numpy as np
from controlrt.perf.worker import serve

class Step:
    runs = 0

    def run(self):
        self.runs += 1
        if self.runs > 2:
            print("out of luck", file=sys.stderr)
            sys.exit(3)

    def outputs(self):
        return {"runs": np.array([self.runs])}

serve(Step(), sys.stdin, sys.stdout)
"""


class Counting:
    def __init__(self) -> None:
        self.runs = 0

    def run(self) -> None:
        self.runs += 1

    def outputs(self) -> dict[str, Any]:
        return {"runs": np.array([self.runs], np.float32)}


def started(script: str, tmp_path: Path) -> WorkerProcess:
    return WorkerProcess("fake", [sys.executable, "-c", script], tmp_path / "fake.log")


def test_commands_are_answered_line_by_line(tmp_path: Path) -> None:
    answers = io.StringIO()
    step = Counting()
    serve(step, io.StringIO(f"step\nstep\nsave {tmp_path / 'two words.npz'}\n"), answers)
    ready, first, second, saved = map(json.loads, answers.getvalue().splitlines())
    assert ready["seconds"] == saved["seconds"] == 0
    assert first["seconds"] > 0
    assert second["peak_bytes"] >= ready["peak_bytes"] > 0
    with np.load(tmp_path / "two words.npz") as outputs:
        assert outputs["runs"] == [2]


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown command 'jump'"):
        serve(Counting(), io.StringIO("jump\n"), io.StringIO())


def test_peak_memory_grows_with_what_is_used() -> None:
    before = peak_memory()
    block = np.ones(before // 8 + 2**22)  # as much as all the process ever had, and 32 MiB
    assert peak_memory() >= block.nbytes > before


def test_a_worker_process_loads_steps_and_ends(tmp_path: Path) -> None:
    with started(SERVED, tmp_path) as worker:
        worker.load()
        assert worker.load_seconds > 0
        assert worker.step() >= 0
        worker.save(tmp_path / "outputs.npz")
        assert worker.peak_bytes > 2**20
    worker.close()
    with np.load(tmp_path / "outputs.npz") as outputs:
        assert outputs["runs"] == [2]


def test_a_worker_that_ends_is_named_with_what_it_said(tmp_path: Path) -> None:
    with started(SERVED, tmp_path) as worker:
        worker.load()
        worker.step()
        with pytest.raises(WorkerError, match=r"the worker of fake ended with exit code 3: out of luck"):
            worker.step()


def test_a_worker_that_is_killed_for_memory_says_what_helps(tmp_path: Path) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with started(script, tmp_path) as worker, pytest.raises(WorkerError, match=r"signal 9.*--memory"):
        worker.load()
