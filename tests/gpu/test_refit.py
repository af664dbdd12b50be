"""Engines with other weights, on a GPU that TensorRT or TensorRT-RTX runs on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from parity.eager import psnr

from controlled_calls import PROMPT, square
from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines.backends import BACKENDS
from controlrt.engines.build import BuildOptions, build
from controlrt.engines.refit import refit
from controlrt.engines.refit_options import RefitOptions
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.errors import BundleError
from controlrt.runtime.manifest import Backend
from controlrt.runtime.profile import ShapeProfile

pytestmark = [pytest.mark.gpu, pytest.mark.bundle]
SAME_PSNR_DB = 50.0
"""Of the same weights in engines that were built apart, whose kernels may be others."""
SOURCES = {name: str(path) for name, path in CONTROLNETS.items()}


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if not BACKENDS[request.param].runs_here():
        pytest.skip(f"{request.param} does not run here")
    backend: Backend = request.param
    return backend


def built(backend: Backend, **options: bool) -> Path:
    kind = next(iter(options))
    output = Path(os.environ["CONTROLRT_CACHE"]) / "tests" / f"demo-{backend}-{kind}"
    made = BuildOptions(
        model=str(MODEL_DIR),
        controlnets=SOURCES,
        profile=ShapeProfile.parse("512x512"),
        output=output,
        backend=backend,
        precision="fp16",
        engine=EngineOptions(**options),
    )
    build(made, "pytest")
    return output


def test_one_controlnet_in_the_place_of_another(backend: Backend, tmp_path: Path) -> None:
    bundle, output = built(backend, refittable=True), tmp_path / "refitted"
    refit(RefitOptions(bundle=bundle, output=output, controlnets={"canny": SOURCES["mask"]}), "pytest")
    call = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 3, "output_type": "np"}
    with ControlNetPipeline.load(output) as pipe, ControlNetPipeline.load(bundle) as before:
        wanted = pipe(image={"mask": square()}, **call).images
        assert psnr(pipe(image={"canny": square()}, **call).images, wanted) >= SAME_PSNR_DB
        assert psnr(before(image={"canny": square()}, **call).images, wanted) < SAME_PSNR_DB


def test_weights_for_engines_without(backend: Backend, tmp_path: Path) -> None:
    stripped, whole = built(backend, strip_weights=True), built(backend, refittable=True)
    call = {"prompt": PROMPT, "image": {"mask": square()}, "num_inference_steps": 4, "seed": 3, "output_type": "np"}
    with pytest.raises(BundleError, match="controlrt refit"), ControlNetPipeline.load(stripped) as pipe:
        pipe(**call)
    refit(RefitOptions(bundle=stripped, output=tmp_path / "refitted"), "pytest")
    sizes = [sum(file.stat().st_size for file in bundle.rglob("*.plan")) for bundle in (stripped, whole)]
    assert sizes[0] < sizes[1] / 2
    with ControlNetPipeline.load(tmp_path / "refitted") as pipe, ControlNetPipeline.load(whole) as expected:
        assert psnr(pipe(**call).images, expected(**call).images) >= SAME_PSNR_DB
