"""How a picture of one size becomes one of another: the modes, their names, the resolution they ask of annotators."""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from controlrt.runtime.errors import UnknownNameError

Fit = Literal["stretch", "crop", "pad", "fill"]
RESIZES: tuple[Fit, ...] = ("stretch", "crop", "pad", "fill")
"""Stretched; scaled to cover and cropped at the middle; scaled to fit, on black; the same on the border's median."""

Resize = Literal["stretch", "crop", "pad", "fill", "Just Resize", "Crop and Resize", "Resize and Fill", 0, 1, 2]
"""A mode by our name, or by the name or number that the ControlNet extension of the web UI has for it."""

EXTENSION_MODES: dict[str, Fit] = {"Just Resize": "stretch", "Crop and Resize": "crop", "Resize and Fill": "fill"}
"""The extension's modes, at the place of their number."""
_OLD_NAMES: dict[str, Fit] = {
    "Inner Fit (Scale to Fit)": "crop",
    "Scale to Fit (Inner Fit)": "crop",
    "Outer Fit (Shrink to Fit)": "fill",
    "Envelope (Outer Fit)": "fill",
}


def resize_named(value: str | int) -> Fit:
    """The mode that a name, in any case, or a number stands for.

    Raises:
        UnknownNameError: neither our name nor the extension's.
    """
    numbered = {str(number): fit for number, fit in enumerate(EXTENSION_MODES.values())}
    ours: dict[str, Fit] = {fit: fit for fit in RESIZES}
    named = {**numbered, **{name.lower(): fit for name, fit in {**ours, **EXTENSION_MODES, **_OLD_NAMES}.items()}}
    text = "" if isinstance(value, bool) else str(value).strip().lower()
    if text not in named:
        shown = [*RESIZES, *EXTENSION_MODES]
        raise UnknownNameError("resize mode", str(value), [*shown, *_OLD_NAMES], "or 0, 1, 2", show=shown)
    return named[text]


def pixel_perfect_resolution(size: tuple[int, int], width: int, height: int, resize: str | int) -> int:
    """The ``processor_res`` at which one pixel of the annotator's picture is one pixel of the output.

    The shorter side of a picture of ``size`` (width, height) once it is scaled to ``width`` x ``height``: by the
    smaller of both ratios where the whole picture must fit in (pad, fill), by the larger otherwise. It is the formula
    of the web UI extension's "Pixel Perfect", halves rounded to even and never less than 1.
    """
    ratios = (width / size[0], height / size[1])
    ratio = min(ratios) if resize_named(resize) in ("pad", "fill") else max(ratios)
    return max(1, round(ratio * min(size)))


def fit(picture: Image.Image, width: int, height: int, resize: str | int) -> Image.Image:
    """The picture at ``width`` x ``height``, in its own mode, resampled by Lanczos's filter; see ``RESIZES``."""
    mode = resize_named(resize)
    size = (width, height)
    if mode == "stretch":
        return picture.resize(size, Image.Resampling.LANCZOS)
    if mode == "crop":
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    thin = round(min(width / picture.width, height / picture.height) * min(picture.size)) < 1
    if mode == "pad" and not thin:  # Pillow before 13 makes nothing of what is thinner than a pixel
        return ImageOps.pad(picture, size, Image.Resampling.LANCZOS)
    return _on(picture, size, 0 if mode == "pad" else border_colour(picture))


def fit_masked(
    picture: Image.Image, mask: NDArray[np.bool_], width: int, height: int, resize: str | int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """An RGB picture and its mask, fitted: colours (height, width, 3) in [0, 1] and a mask (height, width).

    What is masked has no colour, so it has no share in the colours around it. What "fill" adds around the picture is
    masked, so that an inpainting ControlNet paints it; what "pad" adds is black, and wanted so.
    """
    known = np.where(mask, np.float32(0), np.float32(1))
    weighted = np.asarray(np.asarray(picture) / 255 * known[..., None], np.float32)
    mode = resize_named(resize)

    def fitted(plane: NDArray[np.float32]) -> NDArray[np.float32]:
        image = Image.fromarray(np.ascontiguousarray(plane))
        scaled = _on(image, (width, height), 0) if mode == "fill" else fit(image, width, height, mode)
        return np.asarray(scaled, np.float32)

    share = fitted(known)
    unknown = share < 0.5
    if mode == "pad":
        unknown &= fitted(np.ones_like(known)) > 0.5
    divisor = np.where(share < 0.5, np.float32(1), share)
    planes = [fitted(weighted[..., channel]) / divisor for channel in range(3)]
    return np.clip(np.stack(planes, axis=-1), 0, 1), unknown


def border_colour(picture: Image.Image) -> tuple[int, ...] | int:
    """The median of each channel over the outermost pixels, those at the corners twice, halves cut off."""
    array = np.asarray(picture)
    border = np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])
    median = np.median(border, axis=0).astype(np.uint8)
    return int(median) if median.ndim == 0 else tuple(int(value) for value in median)


def _on(picture: Image.Image, size: tuple[int, int], colour: tuple[int, ...] | int) -> Image.Image:
    """The whole picture as large as it goes into ``size``, in the middle of a canvas of one colour."""
    ratio = min(size[0] / picture.width, size[1] / picture.height)
    inner = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    canvas = Image.new(picture.mode, size, cast(float, colour))
    scaled = picture.resize(inner, Image.Resampling.LANCZOS)
    canvas.paste(scaled, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return canvas
