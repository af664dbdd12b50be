"""The page says what becomes of every field of the interfaces that clients know."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")

from controlrt.runtime.server import openai
from controlrt.runtime.server.automatic1111 import fields, units

PAGE = (Path(__file__).parents[3] / "docs" / "server.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("OpenAI", [*openai.ImagesRequest.model_fields, *openai.OFF, *openai.IDLE, "image", "mask"]),
        ("AUTOMATIC1111", [*fields.Txt2Img.model_fields, *fields.Img2Img.model_fields, *fields.OFF, *fields.IDLE]),
        ("AUTOMATIC1111", {*units.Unit.model_fields, *units.ALIASES, *units.OFF, *units.IDLE} - {"place"}),
    ],
)
def test_every_field_is_there(title: str, names: list[str]) -> None:
    assert [name for name in names if f"`{name}`" not in section(title)] == []
