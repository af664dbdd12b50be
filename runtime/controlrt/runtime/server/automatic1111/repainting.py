"""What the web UI does to pictures before and after picture to picture: sizes, masks, the part that is drawn alone.

Pictures are PIL's, masks of mode L: white is drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from controlrt.runtime.fitting import fit

Box = tuple[int, int, int, int]
"""Left, upper, right, lower."""
JUST_RESIZE, CROP, FILL = 0, 1, 2
"""``resize_mode``."""
_FILL_BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""Radii of the blurs that the inside of a mask is filled with, the widest below, and how often each is laid on."""


def flatten(picture: Image.Image) -> Image.Image:
    """RGB, transparency over white."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def read_mask(picture: Image.Image) -> Image.Image:
    """A mask: its transparency where it has some, otherwise its brightness."""
    if "A" in picture.getbands():
        alpha = picture.getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha.point(lambda value: 255 if value > 128 else 0)
    return picture.convert("L")


def resize(picture: Image.Image, mode: int, width: int, height: int) -> Image.Image:
    """The picture at another size: stretched, cropped, or whole with its outermost pixels drawn out."""
    if picture.size == (width, height):
        return picture
    if mode != FILL:
        return fit(picture, width, height, "crop" if mode == CROP else "stretch")
    if width * picture.height < height * picture.width:
        inner = (width, max(1, picture.height * width // picture.width))
    else:
        inner = (max(1, picture.width * height // picture.height), height)
    scaled = np.asarray(picture.resize(inner, Image.Resampling.LANCZOS))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    around = ((top, height - inner[1] - top), (left, width - inner[0] - left), (0, 0))
    return Image.fromarray(np.pad(scaled, around[: scaled.ndim], mode="edge"))


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How a mask is used."""

    invert: bool = False
    blur: tuple[float, float] = (4, 4)
    """Standard deviations of the Gaussian along x and y, in pixels."""
    filled: bool = True
    """Whether the inside starts from the colours around it, or from what is there."""
    alone: bool = True
    """Whether the part around the mask is drawn alone, at full size."""
    padding: int = 0
    """Pixels around the mask that are drawn too, in that case."""


@dataclass(frozen=True, kw_only=True)
class Repainting:
    """One picture that is drawn anew, all of it or what a mask says."""

    picture: Image.Image
    """What the run starts from, of the size that is drawn."""
    mask: Image.Image | None = None
    """Of that size; None for all of it."""
    crop: Box | None = None
    """The part of the original that is drawn; None for the whole."""
    original: Image.Image | None = None
    """What the result is laid upon; None where it is the whole result."""
    overlay: Image.Image | None = None
    """How much of the result shows there: of the original's size, mode L."""

    def finish(self, drawn: Image.Image) -> Image.Image:
        """The result over the original, which is left as it was outside of the mask."""
        if self.original is None or self.overlay is None:
            return drawn
        whole = drawn
        if self.crop is not None:
            left, top, right, lower = self.crop
            whole = self.original.copy()
            whole.paste(resize(drawn, JUST_RESIZE, right - left, lower - top), (left, top))
        return Image.composite(whole, self.original, self.overlay)


def prepare(
    picture: Image.Image, mask: Image.Image | None, masking: Masking, mode: int, width: int, height: int
) -> Repainting:
    """Prepares a picture and its mask for a run.

    Args:
        picture: in any mode.
        mask: of the same size; None for picture to picture.
        masking: how it is used.
        mode: ``resize_mode``.
        width, height: of the run.
    """
    picture = flatten(picture)
    if mask is None:
        return Repainting(picture=resize(picture, mode, width, height))
    mask = read_mask(mask)
    if mask.size != picture.size:
        mask = mask.resize(picture.size)
    if masking.invert:
        mask = ImageOps.invert(mask)
    if any(masking.blur):
        mask = mask.filter(ImageFilter.GaussianBlur(masking.blur))
    box = region(mask, masking.padding, width, height) if masking.alone else None
    if masking.alone and box is None:
        return Repainting(picture=resize(picture, mode, width, height))  # nothing is masked
    if box is not None:
        start, inner = (resize(each.crop(box), FILL, width, height) for each in (picture, mask))
        original, overlay = picture, mask
    else:
        start, inner = resize(picture, mode, width, height), resize(mask, mode, width, height)
        original, overlay = start, inner.point(lambda value: min(2 * value, 255))
    return Repainting(
        picture=fill(start, inner) if masking.filled else start,
        mask=inner,
        crop=box,
        original=original,
        overlay=overlay,
    )


def region(mask: Image.Image, padding: int, width: int, height: int) -> Box | None:
    """The part of a picture around what is masked, in the proportions of ``width`` x ``height`` where there is room.

    None where nothing is masked.
    """
    box = mask.getbbox()
    if box is None:
        return None
    left, right = max(box[0] - padding, 0), min(box[2] + padding, mask.width)
    top, lower = max(box[1] - padding, 0), min(box[3] + padding, mask.height)
    if (right - left) * height > (lower - top) * width:
        top, lower = _widened(top, lower, (right - left) * height // width, mask.height)
    else:
        left, right = _widened(left, right, (lower - top) * width // height, mask.width)
    return left, top, right, lower


def _widened(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """A range of ``length`` around another, moved into 0..limit, or that range where it is shorter."""
    more = max(length - (high - low), 0)
    low = low - more // 2
    low = max(min(low, limit - length), 0)
    return low, min(low + length, limit)


def fill(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, what is masked painted with the colours around it: blurs of the rest, the narrow over the wide."""
    known = picture.convert("RGBA")
    known.putalpha(ImageOps.invert(mask))
    known = known.convert("RGBa")
    canvas = Image.new("RGBA", picture.size)
    for radius, times in _FILL_BLURS:
        blurred = known.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            canvas.alpha_composite(blurred)
    return canvas.convert("RGB")
