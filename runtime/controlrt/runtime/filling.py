"""The bytes of one call: what the buffers of a plan hold that a call decides, but for what earlier stages compute."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.canvas import Canvas
from controlrt.runtime.control_use import ControlUse
from controlrt.runtime.drawing import Drawing
from controlrt.runtime.interpolation import resize_bilinear
from controlrt.runtime.plan import HALF, UNGUIDED


def fill_buffers(buffers: MutableMapping[str, NDArray[Any]], drawing: Drawing, canvas: Canvas) -> None:
    """Writes a drawing's inputs into the buffers of its plan, beside what earlier stages have written there."""
    layout, table, draws = drawing.layout, drawing.table, drawing.draws
    guidance_scale = drawing.guidance_scale
    pictures = np.arange(layout.batch)
    guidance = np.zeros((layout.batch, layout.rows), np.float32)
    conditional = np.zeros((layout.batch, layout.rows), np.float32)
    guidance[pictures, pictures] = 1 - guidance_scale if layout.guided else 1
    if layout.guided:
        guidance[pictures, layout.batch + pictures] = guidance_scale
    conditional[pictures, layout.rows - layout.batch + pictures] = 1
    values: dict[str, NDArray[np.generic] | np.generic | float] = {
        "latents.0": canvas.latents,
        "history.0": 0.0,
        "rows": np.tile(pictures, layout.rows // layout.batch),
        "input_scale": table.input_scale[:, None],
        "update": table.update[:, None],
        "clip": table.clip[:, None],
        "guidance": guidance,
        "conditional": conditional,
        "guidance_rescale": drawing.guidance_rescale if layout.guided else 0.0,
        UNGUIDED: np.eye(layout.batch, dtype=np.float32),
        "mask": canvas.mask,
        "known": canvas.known,
        "blend": table.known[:, None],
    }
    if canvas.inpaint is not None:
        values["inpaint"] = canvas.inpaint
    for use in drawing.uses:
        values[f"conditioning_scale.{use.control.name}"] = use.conditioning_scale(layout.guided)
        _fill_regions(buffers, use)
    for prompt in drawing.image_prompts:
        values[f"ip_scale.{prompt.adapter.name}"] = prompt.row_scale(layout.guided)
    if layout.draws:
        for step in range(len(table)):
            buffers["noise"][step] = draws.randn(canvas.latents.shape) if table.draws[step] else 0
    for name, value in values.items():
        if name in buffers:  # a control that never runs has no buffers
            buffers[name][...] = value
    for name, half in buffers.items():
        if name.endswith(HALF):
            half[...] = buffers[name.removesuffix(HALF)][:, -layout.batch :]


def _fill_regions(buffers: Mapping[str, NDArray[Any]], use: ControlUse) -> None:
    """Where a control acts, at each size that residuals have."""
    for name, buffer in buffers.items():
        if name.startswith("region_") and name.endswith(f".{use.control.name}"):
            buffer[...] = 1 if use.region is None else resize_bilinear(use.region, *buffer.shape[2:])
