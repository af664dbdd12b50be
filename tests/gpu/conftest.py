"""Tests that need an NVIDIA GPU; elsewhere they are skipped and say why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines.backends import BACKENDS
from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.cuda.driver import CudaDevice
from controlrt.runtime.errors import DeviceError
from controlrt.runtime.profile import ShapeProfile

GPU_BACKENDS = tuple(name for name, backend in BACKENDS.items() if backend.device == "cuda")


@pytest.fixture
def gpu() -> Iterator[CudaDevice]:
    """The first GPU, on a stream of its own."""
    try:
        device = CudaDevice()
    except DeviceError as error:
        pytest.skip(str(error))
    yield device
    device.close()


@pytest.fixture(scope="session", params=GPU_BACKENDS)
def on_the_gpu(request: pytest.FixtureRequest) -> Iterator[ControlNetPipeline]:
    """The demo model in float16 on each backend that runs on a GPU, loaded."""
    try:
        CudaDevice().close()
    except DeviceError as error:
        pytest.skip(str(error))
    if not BACKENDS[request.param].runs_here():
        pytest.skip(f"backend {request.param} is not installed, or does not run on this GPU")
    output = Path(os.environ["CONTROLRT_CACHE"]) / "tests" / f"demo-{request.param}-fp16"
    options = BuildOptions(
        model=str(MODEL_DIR),
        controlnets={name: str(path) for name, path in CONTROLNETS.items()},
        profile=ShapeProfile.parse("512x512", "1-4"),
        output=output,
        backend=request.param,
        precision="fp16",
    )
    build(options, "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline
