"""Messages arrive whole, whatever they hold; pictures in RGB as arrays, of which the pipeline makes the same."""

from __future__ import annotations

import io
import pickle
import socket
import struct
import threading
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from controlrt.runtime.pictures import to_hint
from controlrt.runtime.server.channel import Channel, channel
from controlrt.runtime.server.messages import Finished, Submit

COLOURS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def sent(ends: tuple[Channel, Channel], message: object) -> Any:
    """What the other end gets of a message, which may be more than the sockets hold."""
    here, there = ends
    sending = threading.Thread(target=here.send, args=(message,))
    sending.start()
    got = there.receive()
    sending.join()
    return got


@pytest.mark.parametrize("side", [1, 64, 1024])
def test_pictures_arrive_where_they_are_received(ends: tuple[Channel, Channel], side: int) -> None:
    random = np.random.default_rng(side)
    pictures = tuple(random.integers(0, 256, (side, side, 3), np.uint8) for _ in range(3))
    got = sent(ends, [Finished(id="a", pictures=pictures, seeds=(7,), seconds={"total": 0.1})])
    assert (got[0].seeds, got[0].seconds) == ((7,), {"total": 0.1})
    for picture, arrived in zip(pictures, got[0].pictures, strict=True):
        np.testing.assert_array_equal(arrived, picture)
        assert arrived.flags.writeable
        assert not arrived.flags.owndata


def test_pictures_go_beside_their_message(ends: tuple[Channel, Channel]) -> None:
    ends[0].send({"array": COLOURS, "picture": Image.fromarray(COLOURS)})
    count, *sizes = struct.unpack("<4Q", ends[1]._end.recv(32, socket.MSG_WAITALL))
    assert (count, sizes[1:]) == (3, [COLOURS.nbytes] * 2)
    assert sizes[0] < 1000


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {"none": np.zeros((0, 3), np.uint8), "after": np.arange(5)},
        [np.full(3, each, np.float32) for each in range(200)],  # more than a call of the system sends
        {"strided": np.arange(60).reshape(3, 4, 5)[:, ::2], "fortran": np.asfortranarray(np.arange(12).reshape(3, 4))},
        b"bytes" * 100_000,
    ],
)
def test_messages_of_any_kind(ends: tuple[Channel, Channel], message: object) -> None:
    np.testing.assert_equal(sent(ends, message), message)
    np.testing.assert_equal(sent(ends[::-1], message), message)


def test_what_cannot_be_pickled_leaves_the_rest_alone(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(Exception, match="pickle"):
        ends[0].send([COLOURS, lambda: None])
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "PNG")
    with pytest.raises(pickle.PicklingError, match="truncated"):  # not OSError, as if nobody were there
        ends[0].send([Image.open(io.BytesIO(file.getvalue()[:500]))])
    assert sent(ends, "next") == "next"


def test_an_end_in_the_middle_of_a_message(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    here._end.sendall((1).to_bytes(8, "little") + (100).to_bytes(8, "little") + b"half of it")
    here.close()
    with pytest.raises(EOFError):
        there.receive()


def test_nobody_at_the_other_end(ends: tuple[Channel, Channel]) -> None:
    ends[1].close()
    with pytest.raises(OSError, match="Broken pipe"):
        ends[0].send("a")
    with pytest.raises(EOFError):
        ends[0].receive()


def over_the_wire(picture: Any) -> Any:
    """What a worker gets of a request's picture, beside another one."""
    arguments = {"image": {"canny": picture}, "init_image": [picture, Image.new("L", (8, 8))]}
    got = sent(channel(), Submit(id="a", arguments=arguments, deadline=None, previews=False, alone=False))
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
