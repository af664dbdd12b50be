"""Annotators: from an ordinary picture to the control picture that a ControlNet expects."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from controlrt.runtime.errors import ParameterError


def canny(picture: Image.Image, low_threshold: float = 100, high_threshold: float = 200) -> Image.Image:
    """White edges on black by Canny's detector (Canny 1986), as ``cv2.Canny`` finds them; RGB, same size.

    Raises:
        ParameterError: thresholds that are negative, not finite, or in the wrong order.
        ModuleNotFoundError: OpenCV is not installed; it comes with ``controlrt[annotate]``.
    """
    if not 0 <= low_threshold <= high_threshold < float("inf"):
        raise ParameterError(
            "thresholds", f"{low_threshold},{high_threshold}", "two numbers LOW,HIGH with 0 <= LOW <= HIGH"
        )
    import cv2  # half as large as the whole rest of the runtime, and servers that are sent hints do not need it

    edges = cv2.Canny(np.asarray(picture.convert("RGB")), low_threshold, high_threshold)
    return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))


ANNOTATORS = {"canny": canny}
"""Annotators by name."""


def annotator_named_in(*texts: str) -> str | None:
    """The annotator that one of the texts, such as a control's name or source, has as a word; None where none has."""
    words = {word for text in texts for word in re.split(r"[^a-z0-9]+", text.lower())}
    return next((name for name in ANNOTATORS if name in words), None)
