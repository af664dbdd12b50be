"""What the demo model lacks, on small random checkpoints: ControlNet Union, IP-Adapters, T2I-Adapters, consistency
models, VAE tiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ip_adapters import Kind, ip_adapter_tensors, photo, save_image_encoder, save_ip_adapter
from parity.eager import PROMPT, hints, psnr

from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.cuda.driver import CudaDevice
from controlrt.runtime.errors import DeviceError
from controlrt.runtime.manifest import Backend
from controlrt.runtime.profile import ShapeProfile
from families import SIDE, Family

pytestmark = [pytest.mark.gpu, pytest.mark.bundle]
MIN_PSNR_DB = 35.0
"""As of the demo model: rounding to float16, amplified by a few steps."""
SHOWS_DB = 6.0
"""How much farther a picture without control is: the random adapters change little."""

IP_ADAPTERS: dict[str, Kind] = {"shallow": "plain", "shallow_xl": "plus"}
ONE, TWO, THREE = hints(SIDE, 3)
WIDE = hints(320, 1)[0].crop((0, 0, 320, 256))
CALLS: dict[str, list[dict[str, Any]]] = {
    "union": [
        {"image": {"union.depth": ONE}},
        {"image": {"union.depth": ONE, "union.canny": TWO, "first": THREE}, "controlnet_conditioning_scale": 0.8},
    ],
    "shallow": [{"image": {"first": ONE}, "ip_adapter_image": {"plain": photo(1)}}],
    "shallow_xl": [{"image": {"first": ONE}, "ip_adapter_image": {"plus": photo(1)}, "ip_adapter_scale": 0.7}],
    "sd15": [
        {"image": {"depth": ONE}},
        {"image": {"depth": ONE, "sketch": TWO, "first": THREE}, "control_guidance_end": 0.5},
    ],
    "consistency": [{"image": {"first": ONE}}, {"image": {"first": ONE}, "guidance_scale": 2.0}],
    "sd21": [{"image": {"first": WIDE}, "width": 320, "height": 256, "vae_tiling": True}],
}
"""By family."""
FREE = ("width", "height", "vae_tiling", "guidance_scale")
"""What is no control."""
PROFILES = {"sd21": ShapeProfile.parse(f"{SIDE}x{SIDE},320x256", "1-2", vae_tile=256)}
"""Where a picture is larger than the family's own."""


def built(family: Family, name: str, backend: Backend, ip_adapters: dict[str, str]) -> Path:
    output = Path(os.environ["CONTROLRT_CACHE"]) / "tests" / f"{name}-{backend}"
    options = BuildOptions(
        model=str(family.model),
        controlnets={each: str(path) for each, path in family.controlnets.items()},
        adapters={each: str(path) for each, path in family.adapters.items()},
        ip_adapters=ip_adapters,
        profile=PROFILES.get(name, ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-2")),
        output=output,
        backend=backend,
        precision="fp16" if backend == "cuda" else "fp32",
    )
    build(options, "pytest")
    return output


@pytest.fixture(params=CALLS)
def both(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[str, ControlNetPipeline, ControlNetPipeline]]:
    """A family by name, on the GPU and on the CPU."""
    try:
        CudaDevice().close()
    except DeviceError as error:
        pytest.skip(str(error))
    import families

    name = request.param
    family = getattr(families, name)(tmp_path / "family")
    adapters = {}
    if name in IP_ADAPTERS:
        kind = IP_ADAPTERS[name]
        encoder = save_image_encoder(tmp_path / "adapters" / "image_encoder")
        saved = save_ip_adapter(
            encoder.parent / f"{kind}.safetensors", ip_adapter_tensors(family.reference().unet, kind)
        )
        adapters = {kind: str(saved)}
    found = [ControlNetPipeline.load(built(family, name, backend, adapters)) for backend in ("cuda", "onnxruntime")]
    with found[0], found[1]:
        yield name, found[0], found[1]


def test_draws_what_the_cpu_draws(both: tuple[str, ControlNetPipeline, ControlNetPipeline]) -> None:
    name, gpu, cpu = both
    shared = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 7, "output_type": "np"}
    for options in CALLS[name]:
        expected = cpu(**shared, **options).images
        found = psnr(gpu(**shared, **options).images, expected)
        assert found >= MIN_PSNR_DB
        uncontrolled = {key: value for key, value in options.items() if key in FREE}
        assert psnr(gpu(**shared, **uncontrolled).images, expected) < found - SHOWS_DB
