"""Against draws recorded from PyTorch (``torch_randn.json``); tests/parity compares with PyTorch itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from controlrt.runtime.errors import ParameterError
from controlrt.runtime.noise import TorchGenerator

RECORDED = json.loads(Path(__file__).with_name("torch_randn.json").read_text())["streams"]


@pytest.mark.parametrize("stream", RECORDED, ids=lambda stream: f"seed {stream['seed']}")
def test_recorded_draws(stream: dict) -> None:
    generator = TorchGenerator(stream["seed"])
    for draw in stream["draws"]:
        expected = np.float32(draw["values"]).reshape(draw["shape"])
        # logarithm and cosine may differ in the last bits: values reach 5, float32 has 2^-22 there
        np.testing.assert_allclose(generator.randn(tuple(draw["shape"])), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [1.5, "7", True, None, 2**64, -(2**63) - 1])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(ParameterError, match="seed"):
        TorchGenerator(seed)
