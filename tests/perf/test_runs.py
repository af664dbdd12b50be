"""Groups of worker processes, with a script in place of models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from controlrt.perf.child_process import WorkerError
from controlrt.perf.runs import Runs
from controlrt.perf.worker_process import WorkerProcess

SCRIPT = """
import sys
import numpy as np
from controlrt.perf.worker import serve

class Step:
    left = int(sys.argv[1])

    def run(self):
        if self.left == 0:
            sys.exit("no more steps")
        self.left -= 1

    def outputs(self):
        return {"left": np.array([self.left])}

serve(Step(), sys.stdin, sys.stdout)
"""


def runs(tmp_path: Path, **steps: int) -> Runs:
    """Workers that end after so many steps."""

    def start(name: str) -> WorkerProcess:
        return WorkerProcess(name, [sys.executable, "-c", SCRIPT, str(steps[name])], tmp_path / f"{name}.log")

    return Runs(start=start, repeats=2, directory=tmp_path)


def test_the_reference_runs_beside_every_group(tmp_path: Path) -> None:
    measured = runs(tmp_path, reference=99, a=99, b=99, c=99)
    measured.measure("reference", [["a", "b"], ["c"]])
    assert [list(group) for group in measured.samples] == [["reference", "a", "b"], ["reference", "c"]]
    assert all(len(seconds) == 2 for group in measured.samples for seconds in group.values())
    assert measured.load_seconds.keys() == measured.peak_bytes.keys() == {"reference", "a", "b", "c"}
    with np.load(measured.outputs("c")) as outputs:
        assert outputs["left"] == [98]


def test_a_worker_that_ends_costs_its_group_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = runs(tmp_path, reference=99, a=99, b=2, c=99)
    measured.measure("reference", [["a", "b"], ["c"]])
    assert [list(group) for group in measured.samples] == [["reference", "c"]]
    assert measured.lost.keys() == {"a", "b"}
    assert measured.lost["a"] == "the worker of b ended with exit code 1: no more steps"
    assert "not measured: a, b" in capsys.readouterr().err


def test_without_the_reference_there_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="the worker of reference ended"):
        runs(tmp_path, reference=3, a=99).measure("reference", [["a"]])
    with pytest.raises(WorkerError, match="the worker of b ended"):
        runs(tmp_path, reference=99, a=0, b=0).measure("reference", [["a"], ["b"]])
