"""The control picture of inpainting: the picture, and -1 where the ControlNet shall paint."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.annotators.annotator import Annotator, Pixels
from controlrt.runtime.pictures import MASKED


def inpaint(pixels: Pixels, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(height, width, 3), float32: -1 where ``mask`` holds, the picture in [0, 1] elsewhere.

    It is what inpainting ControlNets were trained on, as diffusers' example for control_v11p_sd15_inpaint prepares it.
    """
    return np.where(mask[..., None], np.float32(MASKED), pixels.astype(np.float32) / np.float32(255))


INPAINT = Annotator(
    name="inpaint",
    summary="the picture with -1 where the mask is white: numbers, to a file .npy",
    function=inpaint,
    aliases=("inpaint_only", "inpaint_global_harmonious"),
    needs_mask=True,
)
