"""The demo model's T2I-Adapter: its network fits the UNet, and its weights put colours where the grid has them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter, UNet2DConditionModel
from PIL import Image

from controlrt.demo import ADAPTERS, MODEL_DIR
from controlrt.demo.scenes import sample_scene
from controlrt.export.checkpoint.adapter import feature_places, unet_places

SIDE = 256


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


def test_colours_are_where_the_grid_has_them() -> None:
    """By diffusers' own pipeline, cell by cell: nearer to the grid than what the same seed gives without."""
    adapter = T2IAdapter.from_pretrained(ADAPTERS["color"]).float()
    pipeline = StableDiffusionAdapterPipeline.from_pretrained(MODEL_DIR, adapter=adapter).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    distances = []
    for seed in (3, 8, 30):
        scene = sample_scene(np.random.default_rng(seed))
        grid = scene.control("color", SIDE)
        for scale in (0.0, 1.0):
            picture = pipeline(
                scene.prompt,
                Image.fromarray(grid),
                height=SIDE,
                width=SIDE,
                num_inference_steps=8,
                guidance_scale=3.0,
                adapter_conditioning_scale=scale,
                generator=torch.Generator().manual_seed(7),
                output_type="np",
            ).images[0]
            distances.append(np.linalg.norm(cells(picture) - cells(grid / 255), axis=-1).mean())
    without, with_adapter = np.reshape(distances, (-1, 2)).T
    assert np.median(with_adapter) < 0.5 * np.median(without)


def cells(picture: np.ndarray) -> np.ndarray:
    """The mean colour of each of 8x8 cells: (8, 8, 3)."""
    side = len(picture) // 8
    return picture.reshape(8, side, 8, side, 3).mean((1, 3))
