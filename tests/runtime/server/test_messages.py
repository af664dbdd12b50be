"""How messages are pickled: pictures in RGB arrive as arrays, of which the pipeline makes the same."""

from __future__ import annotations

import io
from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from controlrt.runtime.pictures import to_hint
from controlrt.runtime.server.messages import Submit, pickled

COLOURS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def over_the_wire(picture: Any) -> Any:
    """What a worker gets of a request's picture, beside another one."""
    here, there = Pipe()
    arguments = {"image": {"canny": picture}, "init_image": [picture, Image.new("L", (8, 8))]}
    here.send_bytes(pickled(Submit(id="a", arguments=arguments, deadline=None, previews=False, alone=False)))
    got = there.recv()
    assert got.arguments["init_image"][1].mode == "L"
    return got.arguments["image"]["canny"]


def photograph(orientation: int) -> Image.Image:
    """A picture that a camera held so."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "A camera"
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "PNG", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize(
    "picture", [COLOURS, Image.fromarray(COLOURS), photograph(orientation=1)], ids=["array", "picture", "photograph"]
)
def test_colours_arrive_as_arrays(picture: Any) -> None:
    got = over_the_wire(picture)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, COLOURS)
    np.testing.assert_array_equal(to_hint(got, 64, 48, "canny"), to_hint(picture, 64, 48, "canny"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "turned", "transparent"])
def test_all_else_arrives_as_it_is(mode: str) -> None:
    """Also what says of itself that it is to be turned, or which colour is none."""
    picture = Image.fromarray(COLOURS)
    if mode == "turned":
        picture = photograph(orientation=6)
    elif mode == "transparent":
        picture.info["transparency"] = tuple(int(level) for level in COLOURS[0, 0])
    else:
        picture = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
    got = over_the_wire(picture)
    assert isinstance(got, Image.Image)
    assert (got.mode, got.size) == (picture.mode, picture.size)
    assert got.tobytes() == picture.tobytes()
    assert got.getexif() == picture.getexif()
