"""What ONNX Runtime's programs have computed in is given back where somebody asks for that."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors.base import DECODER
from controlrt.runtime.executors.onnxruntime import IDENTITY, OnnxRuntimeExecutor


def resident() -> int:
    """Bytes of this process in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


@pytest.mark.bundle
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scratch_is_given_back_and_taken_anew(demo_bundle: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 64, 64), np.float32)
    with OnnxRuntimeExecutor(Bundle.open(demo_bundle)) as executor:
        executor.load(DECODER)
        executor.release_scratch()  # what other tests have left
        before = resident()
        first = executor.run(DECODER, {"latents": latents})["picture"]
        taken = resident() - before
        assert taken > 30 * 2**20  # its layers of 512x512 pixels have 16 channels and more
        executor.release_scratch()
        assert resident() - before < 0.2 * taken  # the picture, and what its session keeps for itself
        np.testing.assert_array_equal(executor.run(DECODER, {"latents": latents})["picture"], first)


def test_the_file_that_runs_for_it_computes_nothing() -> None:
    onnx = pytest.importorskip("onnx", reason="reads an ONNX file")
    model = onnx.load_from_string(IDENTITY)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]
