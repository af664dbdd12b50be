"""Against draws recorded from PyTorch (``torch_randn.json``); tests/parity compares with PyTorch itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from controlrt.runtime.errors import ParameterError
from controlrt.runtime.noise import Draws, PhiloxGenerator, TorchGenerator, philox4x32

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


KNOWN_ANSWERS = [
    # kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, words
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    found = philox4x32(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64))
    np.testing.assert_array_equal(found[:, 0], np.array(words, np.uint64))


def test_recorded_draws_of_the_cuda_generator() -> None:
    # torch.manual_seed(0); torch.randn(12, device="cuda"), as recorded in the web UI's documentation of its CPU copy
    expected = [
        *(-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564),
        *(-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497),
    ]
    np.testing.assert_allclose(PhiloxGenerator(0).randn((3, 4)).ravel(), expected, rtol=0, atol=1e-6)


def test_cuda_draws_are_normal_and_follow_one_another() -> None:
    generator = PhiloxGenerator(2**40 + 7)
    first, second = generator.randn((4, 64, 64)), generator.randn((4, 64, 64))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, PhiloxGenerator(7).randn((4, 64, 64)))  # the seed's high bits count
    for draw in (first, second):
        assert abs(draw.mean()) < 4 / draw.size**0.5
        assert draw.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_list_of_seeds_gives_each_picture_its_own_generator(kind: str) -> None:
    together, apart = Draws([3, 4], 2, kind), [Draws(3, 1, kind), Draws(4, 1, kind)]
    for shape in ((2, 4, 8, 8), (2, 3)):
        expected = np.concatenate([one.randn((1, *shape[1:])) for one in apart])
        np.testing.assert_array_equal(together.randn(shape), expected)


def test_bad_draws() -> None:
    with pytest.raises(ParameterError, match="noise is 'mps', but must be cpu or gpu"):
        Draws(1, 1, "mps")
    with pytest.raises(ParameterError, match="one number or 3"):
        Draws([1, 2], 3)
