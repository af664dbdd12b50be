"""Pictures drawn on a GPU, beside those of ONNX Runtime on the CPU in float32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from controlled_calls import CALLS, CHANGES, STEPS, draw
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.cuda.driver import CudaDevice
from controlrt.runtime.errors import DeviceMemoryError
from controlrt.runtime.executors.cuda import CudaPlan

pytestmark = [pytest.mark.gpu, pytest.mark.bundle]
MIN_PSNR_DB = 35.0
"""float16 has 11 bits of mantissa; its rounding gives 45 dB and more on CPUs after a few steps (docs/precision.md)."""

SAME_PSNR_DB = 60.0
"""ONNX Runtime's GroupNorm adds in any order, so two runs of the same differ in the last bits of float16. Latents of
two runs of one graph are 67 dB apart without guidance; guidance of 7.5 makes that 46, on one stream as on two."""


def picture(pipe: ControlNetPipeline, *arguments: Any, **changes: Any) -> NDArray[np.float32]:
    return draw(pipe, *arguments, **{"output_type": "np", **changes})


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.mark.parametrize("name", CALLS)
def test_draws_what_the_cpu_draws(demo: ControlNetPipeline, on_the_gpu: ControlNetPipeline, name: str) -> None:
    picture(on_the_gpu, "a green heart", seed=8)  # leaves other bytes in the buffers
    assert psnr(picture(on_the_gpu, **CALLS[name]), picture(demo, **CALLS[name])) >= MIN_PSNR_DB


def test_captured_equals_uncaptured(on_the_gpu: ControlNetPipeline) -> None:
    captured = picture(on_the_gpu, output_type="latent", guidance_scale=1.0)
    bound = next(reversed(on_the_gpu._bound.values()))
    assert isinstance(bound, CudaPlan)
    bound._queue(decode=False, history=False)
    bound._device.synchronize()
    assert psnr(bound._latents.host, captured) >= SAME_PSNR_DB


def test_changes_between_launches_of_one_capture_take_effect(
    demo: ControlNetPipeline, on_the_gpu: ControlNetPipeline
) -> None:
    first = picture(on_the_gpu)
    bound = next(reversed(on_the_gpu._bound.values()))
    for change in CHANGES:
        changed = picture(on_the_gpu, **change)
        assert next(reversed(on_the_gpu._bound.values())) is bound
        assert psnr(changed, first) < MIN_PSNR_DB
        assert psnr(changed, picture(demo, **change)) >= MIN_PSNR_DB
    assert psnr(picture(on_the_gpu), first) >= SAME_PSNR_DB


def test_callback_sees_the_latents_of_every_step(on_the_gpu: ControlNetPipeline) -> None:
    seen: list[NDArray[np.float32]] = []
    options: dict[str, Any] = {"output_type": "latent", "guidance_scale": 1.0}
    final = picture(on_the_gpu, callback_on_step_end=lambda *given: seen.append(given[3]["latents"].copy()), **options)
    assert len(seen) == STEPS
    np.testing.assert_array_equal(seen[-1], final)
    assert psnr(picture(on_the_gpu, **options), final) >= SAME_PSNR_DB


def test_200_pictures_leak_no_device_memory(on_the_gpu: ControlNetPipeline, gpu: CudaDevice) -> None:
    """Past the first calls, which bind plans and let engines take what they need."""
    for steps in (1, 2, 3):
        picture(on_the_gpu, num_inference_steps=steps)
    before = gpu.free_bytes()
    for number in range(200):
        picture(on_the_gpu, num_inference_steps=1 + number % 3, seed=number)
    assert gpu.free_bytes() >= before


def test_out_of_memory_says_what_is_needed_and_free(on_the_gpu: ControlNetPipeline, gpu: CudaDevice) -> None:
    """Of a pipeline that has no older plan to let go."""
    taken = [gpu.allocate(gpu.free_bytes() - 2**22)]
    try:
        with pytest.raises(DeviceMemoryError) as caught, ControlNetPipeline.load(on_the_gpu.bundle.path) as full:
            picture(full, num_images_per_prompt=4)
    finally:
        for address in taken:
            gpu.free(address)
    free = caught.value.free_bytes or 0
    assert free > 0
    assert caught.value.needed_bytes is None or caught.value.needed_bytes > free  # cuBLAS does not say
    assert np.isfinite(picture(on_the_gpu)).all()
