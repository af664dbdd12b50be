"""A picture as CLIP's image encoder sees it (Radford et al. 2021, arXiv 2103.00020): a square of normalised colours.

The same as transformers' ``CLIPImageProcessor`` with Pillow: the short side brought to the encoder's size with a
bicubic filter, the middle cut out, colours less their mean over their standard deviation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlrt.runtime.errors import PictureError
from controlrt.runtime.pictures import Picture, as_rgb

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""Of the colours that CLIP was trained on, in [0, 1]."""
LONGEST = 50
"""How many times its short side a picture may be long; the ends of such a one are cut off anyway."""


def clip_picture(picture: Picture, side: int, what: str) -> NDArray[np.float32]:
    """The middle of a picture: (3, side, side), float32.

    Args:
        picture: PIL, or an array as a control picture may be; transparency is laid over black.
        side: of the square, in pixels.
        what: the picture is, for messages.

    Raises:
        PictureError: another kind of object or value, or a strip whose middle says nothing of it.
    """
    rgb = as_rgb(picture, what)
    short, long = sorted(rgb.size)
    if long > LONGEST * short:
        raise PictureError(
            f"{what} is {rgb.width}x{rgb.height}, more than {LONGEST} times as long as wide; "
            "cut out the part that matters"
        )
    width, height = (side if edge == short else int(side * edge / short) for edge in rgb.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    square = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / np.float32(255)
    return ((square - MEAN) / STD).transpose(2, 0, 1)
