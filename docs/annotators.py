"""Writes the tables of docs/annotators.md from the registry, and draws its contact sheet.

python docs/annotators.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from controlrt.runtime.annotators import ANNOTATORS, Parameter
from controlrt.runtime.annotators.annotator import PROCESSOR_RES
from controlrt.runtime.annotators.onnx_file import PARAMETERS
from controlrt.runtime.commands import main as controlrt

DOCS = Path(__file__).parent
PAGE = DOCS / "annotators.md"
SCENE = DOCS.parent / "demo" / "pictures" / "scene.png"
SHEET = DOCS / "images" / "annotators.png"
BEGIN, END = "<!-- {}: python docs/annotators.py -->\n", "<!-- end {} -->"


def main() -> int:
    text = PAGE.read_text()
    for name, table in tables().items():
        text = replaced(text, name, table)
    PAGE.write_text(text)
    with tempfile.TemporaryDirectory() as directory:
        mask = Path(directory, "mask.png")
        lower_half().save(mask)
        return controlrt(["annotate", "--grid", str(SCENE), "--mask", str(mask), "-o", str(SHEET)])


def tables() -> dict[str, str]:
    """Every table of the page, by the name of its place."""
    return {"annotators": annotators(), "parameters": parameters(), "networks": networks()}


def replaced(page: str, name: str, table: str) -> str:
    """The page with the table between the marks of its name."""
    before, _, rest = page.partition(BEGIN.format(name))
    _, end, after = rest.partition(END.format(name))
    if not end:
        raise SystemExit(f"{PAGE} has no place for the table {name!r}")
    return f"{before}{BEGIN.format(name)}{table}{end}{after}"


def annotators() -> str:
    rows = ["| annotator | makes | also called | stands in for |", "|---|---|---|---|"]
    for annotator in ANNOTATORS.values():
        names = [", ".join(f"`{name}`" for name in some) for some in (annotator.aliases, annotator.stands_in_for)]
        rows.append(f"| `{annotator.name}` | {annotator.summary} | {' | '.join(names)} |")
    return "\n".join(rows) + "\n"


def parameters() -> str:
    rows = ["| annotator | parameter | default | may be | is |", "|---|---|---|---|---|"]
    without = ", ".join(f"`{annotator.name}`" for annotator in ANNOTATORS.values() if not annotator.resizes)
    rows.append(f"| all but {without} {_row(PROCESSOR_RES)}")
    for annotator in ANNOTATORS.values():
        own = [parameter for parameter in annotator.parameters if parameter is not PROCESSOR_RES]
        rows += [f"| `{annotator.name}` {_row(parameter)}" for parameter in own]
    return "\n".join(rows) + "\n"


def networks() -> str:
    rows = ["| parameter | default | may be | is |", "|---|---|---|---|"]
    return "\n".join([*rows, *map(_row, PARAMETERS)]) + "\n"


def _row(parameter: Parameter) -> str:
    return f"| `{parameter.label}` | {parameter.shown_default} | {parameter.allowed} | {parameter.help} |"


def lower_half() -> Image.Image:
    """What the sheet's inpainting paints anew."""
    width, height = Image.open(SCENE).size
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :] = 255
    return Image.fromarray(mask)


if __name__ == "__main__":
    sys.exit(main())
