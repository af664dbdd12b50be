"""stable-diffusion.cpp, a C++ runtime on ggml, by its Python package ``stable-diffusion-cpp-python``.

It takes no latents, but it draws its noise from PyTorch's generator of the CPU where it is told to, and goes along any
sigmas by Euler's method. So it draws what all others draw, from the same seeds, but that its first latents are the
noise times sigma, where diffusers has sqrt(sigma^2 + 1): 0.2% less where the first timestep is the last of training
("DDIM SGM Uniform"), but 15% at two steps of Stable Diffusion 1.5's own schedule.

The type of its weights does not reach the ControlNet's matrices, which stay in float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.drawer import CallSeconds, Drawn
from controlrt.perf.peers.noise_levels import noise_levels

GGML_TYPES = {"bf16": "bf16", "fp16": "f16"}
"""What matrices are kept in, by precision; kernels of convolutions are in float16 in either."""


class StableDiffusionCppDrawer:
    """See ``Drawer``. It gives no latents away, and draws the pictures of a batch one after the other.

    Options are its defaults, which are the fastest. On two cores of an EPYC, Stable Diffusion 1.5 at 256x256, a step
    takes 5.0 s in bfloat16, 5.2 s in float16 and 5.6 s in float32 or q8_0; 7.3 s with ``diffusion_flash_attn``, and
    5.4 s with ``diffusion_conv_direct``. The decoder takes 8.5 s, and 9.6 s with ``vae_conv_direct``.

    Args:
        model: diffusers folder, as ``PublishedCheckpoint`` has it.
        controlnet: file of the one ControlNet that it can run, by published names.
        precision: of GGML_TYPES.
        threads: CPU threads.
    """

    def __init__(self, model: str, controlnet: str, *, precision: str, threads: int) -> None:
        from stable_diffusion_cpp import StableDiffusion

        self._scheduler = json.loads((Path(model) / "scheduler" / "scheduler_config.json").read_text())
        self._engine = StableDiffusion(
            model_path=model,
            control_net_path=controlnet,
            wtype=GGML_TYPES[precision],
            n_threads=threads,
            rng_type="cpu",
            prediction="v" if self._scheduler.get("prediction_type") == "v_prediction" else "eps",
            vae_decode_only=True,
        )

    def draw(self, call: Call, record: bool) -> Drawn:  # noqa: ARG002
        """See ``Drawer``."""
        (hints,) = call.hints().values()
        schedule = noise_levels(self._scheduler, call.sampler, call.steps)
        started = perf_counter()
        drawn = [
            self._draw(call, seed, prompt, hint, schedule)
            for seed, prompt, hint in zip(call.seeds, call.prompts, hints, strict=True)
        ]
        total = perf_counter() - started
        stages = np.sum([np.diff(marks) for _, marks in drawn], axis=0)
        return Drawn(
            pictures=np.stack([picture for picture, _ in drawn]),
            latents=[],
            seconds=CallSeconds(
                text=float(stages[0]),
                hint=0.0,
                timestep_table=0.0,
                steps=tuple(map(float, stages[1:-1])),
                host_steps=(0.0,) * call.steps,
                host=0.0,
                decode=float(stages[-1]),
                total=total,
            ),
        )

    def _draw(
        self, call: Call, seed: int, prompt: str, hint: NDArray[np.float32], schedule: Sequence[float]
    ) -> tuple[NDArray[np.float32], list[float]]:
        """One picture, and the moments of its beginning, its first step, the end of each step and its end."""
        marks = [perf_counter()]
        (picture,) = self._engine.generate_image(
            prompt=prompt,
            width=call.width,
            height=call.height,
            cfg_scale=call.guidance_scale,
            sample_method="euler",
            sample_steps=call.steps,
            sigmas=", ".join(map(repr, schedule)),
            seed=seed,
            control_image=Image.fromarray(np.rint(hint * 255).astype(np.uint8)),
            control_strength=1.0,
            progress_callback=lambda *_: marks.append(perf_counter()),
        )
        marks.append(perf_counter())
        if len(marks) != call.steps + 3:
            raise RuntimeError(f"{len(marks) - 3} steps were reported, of {call.steps}")
        return np.asarray(picture.convert("RGB"), np.float32) / np.float32(255), marks
