"""What one guided step reads: seeded, the same for every variant, and handed to workers as a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.samplers import COLUMNS, compile_sampler

Array = NDArray[np.float32]

SAMPLER = "DDIM"
STEPS, STEP = 20, 9
"""The step in the middle of a run of 20."""
GUIDANCE_SCALE = 0.5
"""The mean of both rows, so that a comparison sees the model's own error: 7.5 multiplies what rounding does to either
row by about 7, whatever was compiled. No time depends on it: guidance is a matrix product with any scale."""
CONDITIONING_SCALE = 1.0
SEED = 0
OUTPUT_COLUMN = COLUMNS - 3
"""The guided model output among the columns of the sampler's update."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One picture, two rows: unconditional, conditional."""

    latents: Array
    """(1, channels, height/8, width/8), standard normal, as is about right at every step of DDIM."""
    prompt_embeds: Array
    """(2, tokens, channels), standard normal."""
    hint: Array
    """(1, 3, height, width), black and white in blocks."""
    timestep: Array
    """(1,)."""
    update: Array
    """(1, 1 + HISTORY, COLUMNS). Its second row copies the guided model output to the history, where a comparison can
    see it undamped; DDIM keeps no history, so nothing else is lost."""
    clip: Array
    """(1, 3)."""
    input_scale: Array
    """(1,)."""

    def save(self, file: Path) -> None:
        """Writes the arrays as an ``.npz`` file."""
        np.savez(file, **dataclasses.asdict(self))

    @classmethod
    def load(cls, file: Path) -> Self:
        """Reads what ``save`` wrote."""
        with np.load(file) as arrays:
            return cls(**arrays)


def step_inputs(exported: Bundle, part: str) -> StepInputs:
    """Inputs for the step programs of an export.

    Args:
        exported: what ``controlrt export`` wrote.
        part: the ControlNet's program, which names the shapes.
    """
    shapes = {spec.name: _one_picture(spec.shape) for spec in exported.manifest.program(part).inputs}
    rng = np.random.default_rng(SEED)
    config: dict[str, Any] = json.loads(exported.file("scheduler.json").read_text())
    table = compile_sampler(SAMPLER, config, STEPS)
    update = table.update[STEP].copy()
    update[1, :] = 0
    update[1, OUTPUT_COLUMN] = 1
    _, channels, height, width = shapes["hint"]
    blocks = rng.integers(0, 2, (1, channels, height // 16, width // 16))
    return StepInputs(
        latents=rng.standard_normal(shapes["latents"], np.float32),
        prompt_embeds=rng.standard_normal(shapes["prompt_embeds"], np.float32),
        hint=blocks.repeat(16, axis=2).repeat(16, axis=3).astype(np.float32),
        timestep=table.timesteps[[STEP]].astype(np.float32),
        update=update[None].astype(np.float32),
        clip=table.clip[[STEP]].astype(np.float32),
        input_scale=table.input_scale[[STEP]].astype(np.float32),
    )


def _one_picture(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    sizes = {"batch": 1, "rows": 2}
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in shape)
