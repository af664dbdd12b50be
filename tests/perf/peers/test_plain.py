"""The plain export on memory of a device: the CPU stands in for a GPU, on the same calls of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines.build import export_programs
from controlrt.perf import parity
from controlrt.perf.peers import plain
from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.device_programs import DeviceExecutor
from controlrt.perf.peers.half_export import in_half
from controlrt.perf.peers.plain import PlainDrawer
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.profile import ShapeProfile

CONTROLS = {name: str(path) for name, path in CONTROLNETS.items()}
CALL = Call(
    seed=5, batch=2, width=512, height=512, steps=2, sampler="DDIM", guidance_scale=7.5, controls=("canny", "mask")
)


@pytest.fixture(scope="module")
def demo_export() -> Bundle:
    """Of the demo bundle, which has the same one behind it."""
    return Bundle.open(export_programs(str(MODEL_DIR), CONTROLS, ShapeProfile.parse("512x512", "1-4")))


@pytest.fixture
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "DeviceExecutor", lambda bundle, _: DeviceExecutor(bundle, "cpu"))


@pytest.mark.bundle
@pytest.mark.usefixtures("cpu_for_gpu")
def test_device_memory_gives_the_host_s_pictures(demo_export: Bundle) -> None:
    expected = PlainDrawer(demo_export, 1, "cpu").draw(CALL, record=True)
    drawer = PlainDrawer(demo_export, 1, "cuda")
    drawer.draw(CALL, record=False)
    found = drawer.draw(CALL, record=True)  # in memory that a call was drawn in before
    np.testing.assert_allclose(found.pictures, expected.pictures, atol=1e-5)
    np.testing.assert_allclose(np.array(found.latents), np.array(expected.latents), atol=1e-4)
    assert not np.array_equal(found.latents[0], found.latents[1])


@pytest.mark.bundle
@pytest.mark.usefixtures("cpu_for_gpu")
def test_the_export_in_float16_draws_the_same(
    demo_export: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path))
    half = in_half(demo_export)
    half.verify()
    assert {tensor.dtype for tensor in half.manifest.program("controlnet.canny").outputs} == {"float16"}
    assert half.file("programs/weights.bin").stat().st_size < 0.6 * _weight_bytes(demo_export)
    before = half.file("programs/unet.onnx").stat().st_mtime_ns
    assert in_half(demo_export).file("programs/unet.onnx").stat().st_mtime_ns == before
    found, expected = (PlainDrawer(bundle, 1, "cuda").draw(CALL, record=False) for bundle in (half, demo_export))
    assert 40 < parity.psnr(found.pictures, expected.pictures) < 100


def _weight_bytes(bundle: Bundle) -> int:
    return sum(bundle.file(name).stat().st_size for name in bundle.manifest.files if name.endswith(".data"))
