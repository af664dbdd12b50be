"""Draws what a calibration left out, as float32 drew it there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.pictures import to_pixels
from controlrt.runtime.pipeline import ControlNetPipeline


def replay(
    pipeline: ControlNetPipeline, arguments: Mapping[str, Any], hints: Mapping[str, NDArray[np.uint8]]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One call.

    Args:
        pipeline: of any bundle of these models.
        arguments: of the call.
        hints: control pictures by control: (height, width, channels).

    Returns:
        The latents after every step, (steps, batch, channels, height/8, width/8), and the pictures, (batch, height,
        width, 3).
    """
    steps: list[NDArray[np.float32]] = []

    def remember(pipeline: ControlNetPipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        del pipeline, step, timestep
        steps.append(values["latents"])

    output = pipeline(**arguments, image=hints or None, callback_on_step_end=remember, output_type="np")
    return np.stack(steps), to_pixels(output.images)
