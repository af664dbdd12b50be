"""What ONNX Runtime's programs have computed in is given back where somebody asks for that."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors.onnxruntime import IDENTITY, OnnxRuntimeExecutor, open_session

LARGE = """
<ir_version: 9, opset_import: ["" : 18]>
large (float[1] x) => (float y) <int64[1] shape = {67108864}> {
    expanded = Expand (x, shape)
    negated = Neg (expanded)
    y = ReduceSum <keepdims = 0> (negated)
}
"""
"""It computes in 256 MiB."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


@pytest.mark.bundle
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scratch_is_given_back_and_taken_anew(demo_bundle: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="writes an ONNX file")
    file = tmp_path / "large.onnx"
    onnx.save(onnx.parser.parse_model(LARGE), file)
    session = open_session(file)
    with OnnxRuntimeExecutor(Bundle.open(demo_bundle)) as executor:
        executor.release_scratch()  # what other tests have left
        before = resident()
        for _ in range(2):
            assert session.run(None, {"x": np.ones(1, np.float32)})[0] == -(2**26)
            assert resident() > before + 200 * 2**20
            executor.release_scratch()
            assert resident() < before + 50 * 2**20


def test_the_file_that_runs_for_it_computes_nothing() -> None:
    onnx = pytest.importorskip("onnx", reason="reads an ONNX file")
    model = onnx.load_from_string(IDENTITY)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]
