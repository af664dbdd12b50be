from __future__ import annotations

import numpy as np
import pytest

from controlrt.runtime.regions import resize_region

torch = pytest.importorskip("torch", reason="the reference is PyTorch's")


@pytest.mark.parametrize("source", [(64, 64), (128, 64), (7, 5), (1, 1)])
@pytest.mark.parametrize("target", [(8, 8), (16, 8), (1, 1), (9, 4)])
def test_as_pytorch_interpolates(source: tuple[int, int], target: tuple[int, int]) -> None:
    region = np.random.default_rng(0).random(source, np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(region)[None, None], size=target, mode="bilinear", align_corners=False
    )[0, 0].numpy()
    np.testing.assert_allclose(
        resize_region(region, *target), expected, atol=1e-5
    )  # PyTorch keeps positions in float32
