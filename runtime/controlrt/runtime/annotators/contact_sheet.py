"""A contact sheet: what every annotator makes of one picture, side by side, each with its name."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from controlrt.runtime.annotators import Annotator, annotate
from controlrt.runtime.fitting import fit
from controlrt.runtime.pictures import MASKED, Picture

FONT_SIZE = 13
STRIP = 20
"""Height of the strip that a name stands in."""
GAP = 6
MASKED_COLOUR = (200, 0, 200)
"""How -1 is shown, which no colour is."""


def contact_sheet(
    annotators: Iterable[Annotator],
    picture: Image.Image,
    mask: Image.Image | None = None,
    *,
    columns: int = 4,
    side: int = 256,
) -> Image.Image:
    """What every annotator makes of ``picture`` with its defaults, in cells whose longer side is ``side``.

    Annotators that need a mask are left out where there is none. Depth annotators are shown the brightness.
    """
    panels: list[tuple[str, Image.Image]] = []
    for annotator in annotators:
        if annotator.needs_mask and mask is None:
            continue
        made = annotate(annotator, picture, mask if annotator.needs_mask else None)
        panels.append((annotator.name, shown(made)))
    ratio = side / max(picture.size)
    width, height = (max(1, round(one * ratio)) for one in picture.size)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    pitch = (max(width, side) + GAP, height + STRIP + GAP)
    sheet = Image.new("RGB", (columns * pitch[0] + GAP, rows * pitch[1] + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, panel) in enumerate(panels):
        x, y = GAP + index % columns * pitch[0], GAP + index // columns * pitch[1]
        draw.text((x, y + 1), name, fill="black", font_size=FONT_SIZE)
        sheet.paste(fit(panel, width, height, "stretch"), (x, y + STRIP))
    return sheet


def shown(control: Picture) -> Image.Image:
    """A control picture as people can see it: what is -1 in ``MASKED_COLOUR``."""
    if isinstance(control, Image.Image):
        return control
    values = np.asarray(control, np.float32)
    masked = (values == MASKED).any(axis=-1, keepdims=True)
    pixels = np.where(masked, MASKED_COLOUR, np.round(255 * np.clip(values, 0, 1)))
    return Image.fromarray(pixels.astype(np.uint8))
