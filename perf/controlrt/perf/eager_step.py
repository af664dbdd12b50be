"""One guided step in eager PyTorch: the loop of diffusers' StableDiffusionControlNetPipeline, written out."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from controlrt.perf.inputs import CONDITIONING_SCALE, GUIDANCE_SCALE, STEP, STEPS, StepInputs


class EagerStep:
    """The step in float32, as diffusers runs it by default (scaled dot product attention).

    Args:
        model: diffusers folder; UNet and scheduler are loaded.
        controlnet: folder of the ControlNet.
        inputs: what the step reads.
        threads: CPU threads.
        channels_last: whether models and inputs are laid out with channels last.
    """

    def __init__(self, model: Path, controlnet: Path, inputs: StepInputs, threads: int, channels_last: bool) -> None:
        diffusers.logging.set_verbosity_error()
        diffusers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet", local_files_only=True)
        control = diffusers.ControlNetModel.from_pretrained(controlnet, local_files_only=True)
        self._unet = unet.float().eval().requires_grad_(False).to(memory_format=layout)
        self._controlnet = control.float().eval().requires_grad_(False).to(memory_format=layout)
        self._scheduler = diffusers.DDIMScheduler.from_pretrained(model, subfolder="scheduler")
        self._scheduler.set_timesteps(STEPS)
        self._timestep = self._scheduler.timesteps[STEP]
        if float(self._timestep) != float(inputs.timestep[0]):
            raise ValueError(f"the scheduler has timestep {self._timestep} at step {STEP}, not {inputs.timestep[0]}")
        self._latents = torch.from_numpy(inputs.latents).to(memory_format=layout)
        self._prompt_embeds = torch.from_numpy(inputs.prompt_embeds)
        self._hint = torch.from_numpy(inputs.hint).repeat(2, 1, 1, 1).to(memory_format=layout)
        self._outputs: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        """Runs the step once."""
        with torch.inference_mode():
            self._outputs = self._step()

    def outputs(self) -> dict[str, NDArray[np.float32]]:
        """The next latents and the guided model output."""
        return {name: value.contiguous().numpy() for name, value in self._outputs.items()}

    def _step(self) -> dict[str, torch.Tensor]:
        sample = self._scheduler.scale_model_input(torch.cat([self._latents] * 2), self._timestep)
        down, middle = self._controlnet(
            sample,
            self._timestep,
            encoder_hidden_states=self._prompt_embeds,
            controlnet_cond=self._hint,
            conditioning_scale=CONDITIONING_SCALE,
            return_dict=False,
        )
        output = self._unet(
            sample,
            self._timestep,
            encoder_hidden_states=self._prompt_embeds,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        unconditional, conditional = output.chunk(2)
        guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        following = self._scheduler.step(guided, self._timestep, self._latents, return_dict=False)[0]
        return {"next_latents": following, "model_output": guided}
