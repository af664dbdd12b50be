import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlrt.runtime.noise import TorchGenerator

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1), draws=st.lists(shapes, min_size=1, max_size=5))
def test_any_seed_and_any_sequence_of_shapes(seed: int, draws: list[tuple[int, ...]]) -> None:
    theirs, ours = torch.Generator("cpu").manual_seed(seed), TorchGenerator(seed)
    for shape in draws:
        expected = torch.randn(shape, generator=theirs).numpy()
        np.testing.assert_allclose(ours.randn(shape), expected, rtol=0, atol=1e-6)


def test_latents_of_real_size() -> None:
    expected = torch.randn((4, 4, 64, 64), generator=torch.Generator().manual_seed(1)).numpy()
    np.testing.assert_allclose(TorchGenerator(1).randn((4, 4, 64, 64)), expected, rtol=0, atol=1e-6)
