"""Pictures with captions, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw

TILE, CAPTION = 192, 18


def contact_sheet(pictures: Mapping[str, Image.Image], columns: int, tile: int = TILE) -> Image.Image:
    """The pictures by caption, ``columns`` in a row."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * tile, rows * (tile + CAPTION)), "white")
    canvas = ImageDraw.Draw(sheet)
    for index, (caption, picture) in enumerate(pictures.items()):
        x, y = index % columns * tile, index // columns * (tile + CAPTION)
        canvas.text((x + 4, y + 2), caption, fill="black", font_size=13)
        sheet.paste(picture.resize((tile, tile), Image.Resampling.LANCZOS), (x, y + CAPTION))
    return sheet
