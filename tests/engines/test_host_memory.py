"""What sessions of ONNX Runtime take from the host's memory, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

MIB = 2**20
SIDE = 4096
"""One value of a program is (SIDE, SIDE) in float32: 64 MiB."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")

RUNS = """
import sys
from pathlib import Path
import numpy as np
from controlrt.runtime.executors.onnxruntime import open_session

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

sessions = [open_session(Path(file), threads=1) for file in sys.argv[1:]]
before = anonymous()
for _ in range(3):
    for session in sessions:
        assert session.run(None, {"x": np.ones((), np.float32)}) == [9]
    print(anonymous() - before)
"""


def large_in_between(file: Path) -> str:
    """Writes a program whose input and output are one number, with three large values at a time in between."""
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["a"]),
        helper.make_node("Add", ["a", "a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Mul", ["c", "c"], ["d"]),
        helper.make_node("ReduceMax", ["d"], ["y"], keepdims=0),
    ]
    scalar = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in ("x", "y")]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [SIDE, SIDE])
    graph = helper.make_graph(nodes, "large", scalar[:1], scalar[1:], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, file)
    return str(file)


def test_programs_take_turns_in_the_same_memory(tmp_path: Path) -> None:
    """Three programs that each need 128 to 192 MiB take no more together, and none of it grows from run to run."""
    files = [large_in_between(tmp_path / f"{name}.onnx") for name in "abc"]
    done = subprocess.run([sys.executable, "-c", RUNS, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = [int(line) for line in done.stdout.split()]
    assert 100 * MIB < taken[0] < 220 * MIB
    assert taken[2] < taken[0] + 8 * MIB
