"""A call of the pipeline, checked and laid out, before it has memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.canvas import Source
from controlrt.runtime.control_use import ControlUse
from controlrt.runtime.image_prompts import ImagePrompt
from controlrt.runtime.noise import Draws
from controlrt.runtime.plan import Layout
from controlrt.runtime.prompts import Prompt
from controlrt.runtime.samplers import SamplerTable


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """All that decides the pictures of one call."""

    layout: Layout
    table: SamplerTable
    uses: tuple[ControlUse, ...]
    """The controls, also those that never run."""
    image_prompts: tuple[ImagePrompt, ...] = ()
    """One for each of the bundle's IP-Adapters."""
    prompts: tuple[Prompt, ...]
    """One per row of the model's batch."""
    guidance_scale: float
    guidance_rescale: float
    source: Source | None
    """What the run starts from; None for noise alone."""
    pure_noise: bool
    """Whether it starts from noise alone even so (inpainting at strength 1)."""
    latents: NDArray[np.float32] | None
    """Noise in place of the seed's, (batch, channels, height/8, width/8)."""
    draws: Draws
    """The seed's generators. They move on as the buffers are filled, so that a drawing is filled once."""
    seed: int | Sequence[int] | None
