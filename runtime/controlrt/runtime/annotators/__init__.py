"""Annotators: from an ordinary picture to the control picture that a ControlNet expects.

    from controlrt.runtime.annotators import annotate

    edges = annotate("canny", photo, low_threshold=80)

Each is declared once, beside its function; ``ANNOTATORS`` is the list. What takes OpenCV imports it when it runs: it is
half as large as the whole rest of the runtime, and servers that are sent control pictures do not need it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlrt.runtime.annotators import colours, inpaint, lines, normal_map, soft_edges
from controlrt.runtime.annotators.annotator import PROCESSOR_RES, Annotator, Given, Parameter
from controlrt.runtime.annotators.onnx_file import open_annotator
from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError, UserError
from controlrt.runtime.fitting import Resize, fit, pixel_perfect_resolution, resize_named
from controlrt.runtime.pictures import Picture, as_rgb, to_depth, to_hint

__all__ = [
    "ANNOTATORS",
    "Annotator",
    "Given",
    "Parameter",
    "annotate",
    "annotator_called",
    "annotator_named_in",
    "open_annotator",
]

ANNOTATORS: Mapping[str, Annotator] = MappingProxyType(
    {
        annotator.name: annotator
        for annotator in (
            colours.NONE,
            lines.CANNY,
            soft_edges.SOFT_EDGE,
            soft_edges.SCRIBBLE,
            soft_edges.SCRIBBLE_XDOG,
            lines.LINEART_STANDARD,
            lines.LINEART,
            lines.STRAIGHT_LINES,
            normal_map.NORMAL_MAP,
            colours.TILE,
            colours.BLUR,
            colours.COLOUR_GRID,
            colours.SHUFFLE,
            inpaint.INPAINT,
            colours.INVERT,
            colours.THRESHOLD,
        )
    }
)
"""Annotators by name."""


def annotator_called(name: str, opened: Mapping[str, Annotator] = MappingProxyType({})) -> Annotator:
    """The annotator of a name or alias, in any case; those ``opened`` from files come first.

    Raises:
        UnknownNameError: nobody answers to it.
    """
    known = {one.lower(): annotator for annotator in ANNOTATORS.values() for one in annotator.names}
    known |= {one.lower(): annotator for one, annotator in opened.items()}
    if name.lower() not in known:
        raise UnknownNameError(
            "annotator",
            name,
            known,
            "networks are given as files: --annotator NAME=FILE.onnx",
            show=[*ANNOTATORS, *opened],
        )
    return known[name.lower()]


def annotate(
    annotator: str | Annotator,
    picture: Picture,
    mask: Picture | None = None,
    *,
    width: int | None = None,
    height: int | None = None,
    resize_mode: Resize = "crop",
    pixel_perfect: bool = False,
    **parameters: Given,
) -> Picture:
    """Makes a control picture.

    Args:
        annotator: its name or alias, or one that ``open_annotator`` gave.
        picture: PIL picture or array, as ``to_hint`` takes them; depth pictures may have 16 bits.
        mask: white, or true, where an inpainting ControlNet shall paint; of the picture's size.
        width, height: size of the result, both or neither; without them the annotator decides.
        resize_mode: how the result is fitted to them.
        pixel_perfect: the annotator works at the resolution that the result has, in place of ``processor_res``.
        parameters: the annotator's own, under either of their names.

    Returns:
        A PIL picture, RGB; for ``inpaint`` (height, width, 3), float32 in [0, 1] and -1.

    Raises:
        UnknownNameError: no such annotator, parameter or mode.
        ParameterError: a value out of range.
        PictureError: a picture or mask that cannot be used.
        ModuleNotFoundError: OpenCV is needed and not installed; it comes with ``controlrt[annotate]``.
    """
    chosen = annotator if isinstance(annotator, Annotator) else annotator_called(annotator)
    name = chosen.name if isinstance(annotator, Annotator) else annotator.lower()
    if (width is None) != (height is None):
        raise UserError("give both width and height of a control picture, or neither")
    for side, value in (("width", width), ("height", height)):
        if value is not None and not 1 <= value <= 8192:
            raise ParameterError(side, value, "from 1 to 8192 pixels")
    mode = resize_named(resize_mode)
    values = chosen.values(parameters, name)
    pixels = (
        to_depth(picture) if chosen.takes == "depth" else np.asarray(as_rgb(picture, f"{chosen.name}: the picture"))
    )
    if pixel_perfect:
        values |= _pixel_perfect(chosen, pixels, width, height, mode, parameters)
    inputs: list[NDArray[Any]] = [pixels, *_mask(chosen, mask, pixels)]
    if name in chosen.stands_in_for:
        warnings.warn(
            f"{name} is a network in the web UI; this is the filter {chosen.name}; "
            f"for the network itself: --annotator NAME=FILE.onnx",
            stacklevel=2,
        )
    made = chosen.function(*inputs, **values)
    if made.dtype == np.uint8:
        shown = Image.fromarray(made)
        return shown if width is None or height is None else _sized(shown, width, height, mode)
    if width is None or height is None or made.shape[:2] == (height, width):
        return made
    return to_hint(made, width, height, chosen.name, mode).transpose(1, 2, 0)


def annotator_named_in(*texts: str) -> str | None:
    """The annotator that one of the texts, such as a control's name or source, has as a word; None where none has.

    ``lllyasviel/control_v11p_sd15_softedge`` has ``softedge``. Aliases count too, but not those of ``none``.
    """
    words = {word for text in texts for word in re.split(r"[^a-z0-9]+", text.lower())}
    found = (annotator for annotator in ANNOTATORS.values() if annotator is not colours.NONE)
    return next((annotator.name for annotator in found if words.intersection(annotator.names)), None)


def _pixel_perfect(
    chosen: Annotator,
    pixels: NDArray[Any],
    width: int | None,
    height: int | None,
    mode: Resize,
    given: Mapping[str, Given],
) -> dict[str, int]:
    """The resolution, where the annotator takes one."""
    if width is None or height is None:
        raise UserError("pixel_perfect needs the size of the result: give width and height")
    if given.keys() & {PROCESSOR_RES.name, PROCESSOR_RES.alias}:
        raise UserError("give pixel_perfect or processor_res, not both")
    resolution = pixel_perfect_resolution((pixels.shape[1], pixels.shape[0]), width, height, mode)
    return {PROCESSOR_RES.keyword: resolution} if chosen.resizes else {}


def _mask(chosen: Annotator, mask: Picture | None, pixels: NDArray[Any]) -> list[NDArray[np.bool_]]:
    """What the annotator is called with after the pixels."""
    if mask is None:
        if chosen.needs_mask:
            raise PictureError(f"{chosen.name} needs a mask, white where to paint; give one: --mask FILE")
        return []
    if not chosen.needs_mask:
        raise UserError(f"{chosen.name} takes no mask; leave it out")
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        mask = np.where(mask, np.uint8(255), np.uint8(0))
    grey = np.asarray(as_rgb(mask, "the mask").convert("L"))
    if grey.shape != pixels.shape[:2]:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (grey, pixels)]
        raise PictureError(f"the mask is {sizes[0]}, the picture {sizes[1]}; give one of the picture's size")
    return [grey > 127]


def _sized(picture: Image.Image, width: int, height: int, mode: Resize) -> Image.Image:
    return picture if picture.size == (width, height) else fit(picture, width, height, mode)
