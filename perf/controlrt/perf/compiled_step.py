"""One guided step of a bundle's programs, through the runtime's own plan and executors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from controlrt.perf.inputs import CONDITIONING_SCALE, GUIDANCE_SCALE, StepInputs
from controlrt.perf.models import CONTROL
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors import open_host_executor
from controlrt.runtime.manifest import Manifest, Stage
from controlrt.runtime.plan import PER_STEP_STAGES, Layout, StepLayout, plan_denoising, stage_buffer

EARLIER: tuple[Stage, ...] = ("timestep", "prompt", "prompt_timestep", "hint")


class CompiledStep:
    """The step, bound to memory and conditioned: what the loop of the runtime repeats.

    Programs that are whole run as steps too: a plan then gives them the prompt, the hint and the timestep themselves.

    Args:
        directory: where the programs lie.
        manifest: the manifest file that names them.
        inputs: what the step reads.
        threads: CPU threads.
    """

    def __init__(self, directory: Path, manifest: Path, inputs: StepInputs, threads: int) -> None:
        bundle = Bundle(directory, msgspec.json.decode(manifest.read_bytes(), type=Manifest))
        width, height = bundle.manifest.profile.default_size
        layout = Layout(
            width=width, height=height, batch=1, draws=False, steps=(StepLayout(controls=(CONTROL,), guided=True),)
        )
        self._executor = open_host_executor(bundle, threads)
        plan = plan_denoising(bundle.manifest, layout)
        self._bound = self._executor.bind(plan)
        values = {
            "latents.0": inputs.latents,
            "rows": np.zeros(2, np.int64),
            "prompt_embeds": inputs.prompt_embeds,
            "hint": inputs.hint,
            "timestep": inputs.timestep,
            "input_scale": inputs.input_scale,
            "update": inputs.update,
            "clip": inputs.clip,
            "guidance": np.array([1 - GUIDANCE_SCALE, GUIDANCE_SCALE], np.float32),
            "conditional": np.array([0, 1], np.float32),
            "mask": np.float32(1),
            f"conditioning_scale.{CONTROL}": np.float32(CONDITIONING_SCALE),
        }
        for name, value in values.items():
            if name in self._bound.buffers:  # a program that was cut reads less
                self._bound.buffers[name][...] = value
        for name, buffer in self._bound.buffers.items():
            if name.startswith("region_"):
                buffer[...] = 1
        for part in plan.parts:
            for stage in EARLIER:
                self._condition(bundle.manifest, part, stage, inputs)

    def run(self) -> None:
        """Runs the step once; it reads the same buffers every time."""
        self._bound.run_step(0)

    def outputs(self) -> dict[str, NDArray[np.float32]]:
        """The next latents and the guided model output."""
        buffers = self._bound.buffers
        return {"next_latents": buffers["latents.1"], "model_output": buffers["history.1"][:, 0]}

    def _condition(self, manifest: Manifest, part: str, stage: Stage, inputs: StepInputs) -> None:
        """Runs a stage that comes before the loop and puts what it gives where the step reads it."""
        program = manifest.stage(part, stage)
        if program is None:
            return
        given = {"timestep": inputs.timestep, "prompt_embeds": inputs.prompt_embeds, "hint": inputs.hint}
        if stage == "prompt_timestep":
            given["timestep"] = inputs.timestep.repeat(2)
        own = {spec.name: given[spec.name.partition(".")[0]] for spec in program.inputs}  # a fused step has hint.NAME
        found = self._executor.run(program.name, own)
        for spec in program.outputs:
            buffer = self._bound.buffers[stage_buffer(spec.name, part)]
            (buffer[0] if stage in PER_STEP_STAGES else buffer)[...] = found[spec.name]
