"""Pictures drawn on a GPU, beside those of ONNX Runtime on the CPU in float32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.cuda.driver import CudaDevice
from controlrt.runtime.errors import DeviceMemoryError
from controlrt.runtime.executors.cuda import CudaPlan

pytestmark = [pytest.mark.gpu, pytest.mark.bundle]
PROMPT = "a red star on a light blue background"
MIN_PSNR_DB = 35.0
"""float16 has 11 bits of mantissa; its rounding gives 45 dB and more on CPUs after a few steps (docs/precision.md)."""

SAME_PSNR_DB = 60.0
"""ONNX Runtime's GroupNorm adds in any order, so two runs of the same differ in the last bits of float16."""


def square(start: int = 120) -> Image.Image:
    picture = np.zeros((512, 512, 3), np.uint8)
    picture[start : start + 250, 130:380] = 255
    return Image.fromarray(picture)


def draw(pipe: ControlNetPipeline, prompt: str = PROMPT, **changes: Any) -> NDArray[np.float32]:
    options: dict[str, Any] = {
        "image": {"mask": square()},
        "num_inference_steps": 4,
        "seed": 3,
        "output_type": "np",
        **changes,
    }
    return pipe(prompt, **options).images


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


CALLS: dict[str, dict[str, Any]] = {
    "one control": {},
    "two controls, a window, a curve": {
        "image": {"mask": square(), "canny": square(90)},
        "control_guidance_end": {"mask": 0.5, "canny": 1.0},
        "controlnet_conditioning_scale": {"mask": [1.0, 0.7, 0.4, 0.1], "canny": 0.5},
    },
    "guess mode beside a plain control": {
        "image": {"mask": square(), "canny": square(90)},
        "control_mode": {"mask": "controlnet", "canny": "balanced"},
    },
    "no control": {"image": None},
    "no guidance": {"guidance_scale": 1.0},
    "guidance window": {"guidance_start": 0.4},
    "four pictures, with noise at each step": {"num_images_per_prompt": 4, "scheduler": "Euler a"},
    "inpainting": {"init_image": square(60), "mask_image": square(200)},
    "other text": {"prompt": "a black moon", "negative_prompt": "blurred"},
}


@pytest.mark.parametrize("name", CALLS)
def test_draws_what_the_cpu_draws(demo: ControlNetPipeline, on_the_gpu: ControlNetPipeline, name: str) -> None:
    draw(on_the_gpu, "a green heart", seed=8)  # leaves other bytes in the buffers
    assert psnr(draw(on_the_gpu, **CALLS[name]), draw(demo, **CALLS[name])) >= MIN_PSNR_DB


def test_captured_equals_uncaptured(on_the_gpu: ControlNetPipeline) -> None:
    captured = draw(on_the_gpu, output_type="latent")
    bound = next(reversed(on_the_gpu._bound.values()))
    assert isinstance(bound, CudaPlan)
    bound._queue(decode=False)
    bound._device.synchronize()
    assert psnr(bound._latents.host, captured) >= SAME_PSNR_DB


def test_changes_between_launches_of_one_capture_take_effect(
    demo: ControlNetPipeline, on_the_gpu: ControlNetPipeline
) -> None:
    first = draw(on_the_gpu)
    bound = next(reversed(on_the_gpu._bound.values()))
    changes: list[dict[str, Any]] = [
        {"seed": 4},
        {"controlnet_conditioning_scale": 0.3},
        {"guidance_scale": 3.0},
        {"image": {"mask": square(40)}},
        {"prompt": "a black moon"},
    ]
    for change in changes:
        changed = draw(on_the_gpu, **change)
        assert next(reversed(on_the_gpu._bound.values())) is bound
        assert psnr(changed, first) < MIN_PSNR_DB
        assert psnr(changed, draw(demo, **change)) >= MIN_PSNR_DB
    assert psnr(draw(on_the_gpu), first) >= SAME_PSNR_DB


def test_callback_sees_the_latents_of_every_step(on_the_gpu: ControlNetPipeline) -> None:
    seen: list[NDArray[np.float32]] = []
    final = draw(
        on_the_gpu, output_type="latent", callback_on_step_end=lambda *given: seen.append(given[3]["latents"].copy())
    )
    assert len(seen) == 4
    np.testing.assert_array_equal(seen[-1], final)
    assert psnr(draw(on_the_gpu, output_type="latent"), final) >= SAME_PSNR_DB


def test_200_pictures_leak_no_device_memory(on_the_gpu: ControlNetPipeline, gpu: CudaDevice) -> None:
    """Past the first calls, which bind plans and let engines take what they need."""
    for steps in (1, 2, 3):
        draw(on_the_gpu, num_inference_steps=steps)
    before = gpu.free_bytes()
    for picture in range(200):
        draw(on_the_gpu, num_inference_steps=1 + picture % 3, seed=picture)
    assert gpu.free_bytes() >= before


def test_out_of_memory_says_what_is_needed_and_free(on_the_gpu: ControlNetPipeline, gpu: CudaDevice) -> None:
    taken = [gpu.allocate(gpu.free_bytes() - 2**22)]
    try:
        with pytest.raises(DeviceMemoryError) as caught:
            draw(on_the_gpu, num_inference_steps=9, num_images_per_prompt=4)
    finally:
        for address in taken:
            gpu.free(address)
    free = caught.value.free_bytes or 0
    assert free > 0
    assert caught.value.needed_bytes is None or caught.value.needed_bytes > free  # cuBLAS does not say
    assert np.isfinite(draw(on_the_gpu, num_inference_steps=9)).all()
