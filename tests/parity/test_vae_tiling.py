"""The VAE in tiles against diffusers' ``enable_vae_tiling``, on the same weights, latents and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity.eager import PROMPT
from runtime.cuda.simulated import SimulatedDevice, SimulatedEngines

from controlrt.demo.scenes import sample_scene
from controlrt.engines.build import BuildOptions, build
from controlrt.export import checkpoint
from controlrt.export.programs import vae_programs
from controlrt.export.trace import export_program
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.errors import ParameterError
from controlrt.runtime.executors import open_executor
from controlrt.runtime.executors.cuda import CudaExecutor
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.stepping import Stepper
from controlrt.runtime.vae import Vae
from families import Family

TILE, WIDTH, HEIGHT = 256, 448, 320
PROFILE = ShapeProfile.parse(f"{WIDTH}x{HEIGHT},{TILE}x{TILE}", vae_tile=TILE)
BOUND = 1e-4
SHARED: dict[str, Any] = {"num_inference_steps": 1, "seed": 7}

pytestmark = pytest.mark.parametrize("family", ["sd21"], indirect=True, scope="module")


class Traced:
    """The VAE's programs as they are exported for tiles, before any pass."""

    def __init__(self, model: Path, folder: Path) -> None:
        for spec in vae_programs(checkpoint.load(model, {}), tiles=True):
            export_program(spec, PROFILE.of(spec.name), folder)
        self.sessions = {name: open_session(folder / f"{name}.onnx") for name in ("vae_decoder", "vae_encoder")}

    def run(self, program: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        session = self.sessions[program]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))


@pytest.fixture(scope="module")
def vae(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Vae:
    manifest = SimpleNamespace(model=SimpleNamespace(vae_scale_factor=8), profile=PROFILE)
    return Vae(manifest, Traced(family.model, tmp_path_factory.mktemp("traced")))  # type: ignore[arg-type]


def tiled(family: Family) -> Any:
    vae = family.reference().vae
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 8
    return vae


def picture(width: int, height: int) -> np.ndarray:
    """A scene with grain: in a tile of one colour the norms would divide rounding errors by next to nothing."""
    rng = np.random.default_rng(3)
    whole = sample_scene(rng).render(max(width, height))[None, :height, :width].astype(np.float32) / 255
    return 0.7 * whole + 0.3 * rng.random(whole.shape, np.float32)


@pytest.mark.parametrize(("width", "height"), [(WIDTH, HEIGHT), (TILE, TILE)])
def test_decoder(vae: Vae, family: Family, width: int, height: int) -> None:
    reference = tiled(family)
    latents = np.random.default_rng(0).standard_normal((2, 4, height // 8, width // 8), np.float32)

    def decoded() -> NDArray[np.float32]:
        sample = reference.decode(torch.from_numpy(latents) / reference.config.scaling_factor).sample
        return (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    found = vae.decode(latents)
    assert np.abs(found - decoded()).max() < BOUND
    reference.disable_tiling()
    assert (np.abs(found - decoded()).max() > 100 * BOUND) == (width > TILE)


@pytest.mark.parametrize(("width", "height"), [(WIDTH, HEIGHT), (TILE, TILE)])
def test_encoder(vae: Vae, family: Family, width: int, height: int) -> None:
    reference = tiled(family)
    pixels = picture(width, height)
    posterior = reference.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1).latent_dist
    mean, std = vae.encode(pixels)
    scale = reference.config.scaling_factor
    assert np.abs(mean - (posterior.mean * scale).numpy()).max() < BOUND
    assert np.abs(std - (posterior.std * scale).numpy()).max() < BOUND


@pytest.mark.slow
def test_a_call_decodes_and_encodes_in_tiles(family: Family, tmp_path: Path) -> None:
    bundle = tmp_path / "tiles"
    build(BuildOptions(model=str(family.model), controlnets={}, profile=PROFILE, output=bundle), "pytest")
    with ControlNetPipeline.load(bundle) as pipeline, open_executor(pipeline.bundle) as executor:
        latents = pipeline(PROMPT, output_type="latent", vae_tiling=True, **SHARED).images
        pictures = pipeline(PROMPT, output_type="np", vae_tiling=True, **SHARED).images
        np.testing.assert_array_equal(pictures, Vae(pipeline.bundle.manifest, executor).decode(latents))
        changed = pipeline(
            PROMPT, init_image=pictures[0], strength=1.0, output_type="latent", vae_tiling=True, **SHARED
        ).images
        assert changed.shape == latents.shape
        with pytest.raises(ParameterError, match=rf"vae_tiling is False, but must be True .* at most {TILE}x{TILE}"):
            pipeline(PROMPT, **SHARED)
        stepper = Stepper(pipeline.bundle, executor)
        np.testing.assert_array_equal(stepper.decode(latents), pictures)
        device = SimulatedDevice()
        with CudaExecutor(pipeline.bundle, device, SimulatedEngines(device)) as on_gpu:
            np.testing.assert_array_equal(Vae(pipeline.bundle.manifest, on_gpu).decode(latents), pictures)
        small = pipeline(PROMPT, width=TILE, height=TILE, output_type="np", **SHARED).images
        assert small.min() >= 0
        assert small.max() <= 1
