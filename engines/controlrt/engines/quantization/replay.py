"""Draws what a calibration left out, as float32 drew it there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.pictures import to_pixels
from controlrt.runtime.pipeline import ControlNetPipeline


def replay(
    pipeline: ControlNetPipeline, arguments: Mapping[str, Any], hints: Mapping[str, NDArray[np.uint8]]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One call, with its pictures.

    Args:
        pipeline: of any bundle of these models.
        arguments: of the call.
        hints: control pictures by control: (height, width, channels).

    Returns:
        The latents after every step, (steps, batch, channels, height/8, width/8), and the pictures, (batch, height,
        width, 3).
    """
    latents, images = _draw(pipeline, arguments, hints, "np")
    return latents, to_pixels(images)


def replay_latents(
    pipeline: ControlNetPipeline, arguments: Mapping[str, Any], hints: Mapping[str, NDArray[np.uint8]]
) -> NDArray[np.float32]:
    """The same without the decoder: the latents after every step."""
    return _draw(pipeline, arguments, hints, "latent")[0]


def _draw(
    pipeline: ControlNetPipeline,
    arguments: Mapping[str, Any],
    hints: Mapping[str, NDArray[np.uint8]],
    output_type: Literal["np", "latent"],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    steps: list[NDArray[np.float32]] = []

    def remember(pipeline: ControlNetPipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        del pipeline, step, timestep
        steps.append(values["latents"])

    output = pipeline(**arguments, image=hints or None, callback_on_step_end=remember, output_type=output_type)
    return np.stack(steps), output.images
