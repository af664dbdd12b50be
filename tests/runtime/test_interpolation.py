from __future__ import annotations

import numpy as np
import pytest

from controlrt.runtime.interpolation import resize_bilinear

torch = pytest.importorskip("torch", reason="the reference is PyTorch's")


@pytest.mark.parametrize("source", [(64, 64), (128, 64), (7, 5), (1, 1)])
@pytest.mark.parametrize("target", [(8, 8), (16, 8), (1, 1), (9, 4), (128, 192)])
def test_as_pytorch_interpolates(source: tuple[int, int], target: tuple[int, int]) -> None:
    planes = np.random.default_rng(0).random((2, 3, *source), np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(planes), size=target, mode="bilinear", align_corners=False
    ).numpy()
    found = resize_bilinear(planes, *target)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # PyTorch keeps positions in float32
