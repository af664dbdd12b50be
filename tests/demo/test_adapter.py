"""The demo model's T2I-Adapter, as far as it is there: the network, which fits the UNet, and a step of its training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from controlrt.demo import MODEL_DIR
from controlrt.export.checkpoint.adapter import feature_places, unet_places


@pytest.fixture
def build_adapter(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "demo")
    from networks import build_adapter

    yield build_adapter
    sys.modules.pop("networks", None)


def test_the_untrained_adapter_fits_the_unet(build_adapter: object) -> None:
    torch.manual_seed(0)
    adapter = build_adapter()  # type: ignore[operator]
    unet = UNet2DConditionModel.from_pretrained(MODEL_DIR, subfolder="unet").float()
    places = feature_places(adapter, 8)
    assert places == unet_places(unet)[: len(places)]
    features = adapter(torch.rand(1, 3, 256, 256))
    latents, prompt = torch.randn(1, 4, 32, 32), torch.zeros(1, 77, 64)
    plain = unet(latents, 500, prompt).sample
    changed = unet(latents, 500, prompt, down_intrablock_additional_residuals=features).sample
    assert 0 < (changed - plain).square().mean() < 0.1 * plain.square().mean()
