"""Pictures from bytes and base64, and back."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("isal", reason="without the extra [serve] there is no server")

from controlrt.runtime.errors import RequestError
from controlrt.runtime.server.pictures_io import PictureReader, encode, encode_base64

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def written(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_reads_what_pillow_wrote(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = PictureReader(100).decode(written(Image.fromarray(PIXELS), kind, **options), "image")
    np.testing.assert_array_equal(np.asarray(picture), PIXELS)


def test_keeps_the_bits_of_depth() -> None:
    depth = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    picture = PictureReader(100).decode(written(Image.fromarray(depth), "PNG"), "image")
    np.testing.assert_array_equal(np.asarray(picture), depth)


def test_turns_pictures_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = PictureReader(100).decode(written(Image.fromarray(PIXELS), "PNG", exif=exif), "image")
    np.testing.assert_array_equal(np.asarray(picture), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,", "data:image/png;name=x;base64,"])
def test_reads_base64_and_data_urls(prefix: str) -> None:
    text = encode_base64(PIXELS)
    for form in (text, f"{text[:20]}\r\n {text[20:]}\n"):
        picture = PictureReader(100).decode_text(prefix + form, "image")
        np.testing.assert_array_equal(np.asarray(picture), PIXELS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data:image/png,abc", "not of base64"),
        ("data:image/png;base64", "not of base64"),
        ("https://example.org/x.png", "fetches nothing"),
        ("file:///etc/passwd", "fetches nothing"),
        ("../x.png", "neither base64"),
        ("é", "neither base64"),
        ("abc", "neither base64"),
        ("", "not a picture"),
    ],
)
def test_refuses_other_text(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        PictureReader(100).decode_text(text, "init_image")
    assert caught.value.parameter == "init_image"


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA"])
def test_refuses_formats_that_nobody_sends(kind: str) -> None:
    with pytest.raises(RequestError, match="not a picture that can be read"):
        PictureReader(10_000).decode(written(Image.fromarray(PIXELS), kind), "image")


def test_refuses_damaged_files() -> None:
    with pytest.raises(RequestError, match="damaged or cut short"):
        PictureReader(100).decode(encode(PIXELS)[:80], "image")


@pytest.mark.parametrize(("width", "height"), [(11, 10), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_refuses_bombs_before_they_unpack(width: int, height: int) -> None:
    with pytest.raises(RequestError, match="pixels; all pictures of a request may have 100 together"):
        PictureReader(100).decode(bomb(width, height), "image")


def test_counts_the_pixels_of_all_pictures() -> None:
    reader = PictureReader(100)
    for _ in range(2):
        reader.decode(encode(PIXELS), "image")
    with pytest.raises(RequestError, match="8x6 pixels"):
        reader.decode(encode(PIXELS), "image")


@given(st.binary(max_size=64))
def test_any_bytes_are_a_picture_or_an_error(data: bytes) -> None:
    with pytest.raises(RequestError):
        PictureReader(100).decode(data, "image")


@given(st.text("aAz09+/=_-:;,.é \n", max_size=64))
def test_any_text_is_a_picture_or_an_error(text: str) -> None:
    with pytest.raises(RequestError):
        PictureReader(100).decode_text(text, "image")


@given(st.integers(0, 255), st.integers(0, len(encode(PIXELS)) - 1))
def test_any_damage_is_a_picture_or_an_error(value: int, place: int) -> None:
    data = bytearray(encode(PIXELS))
    data[place] = value
    with contextlib.suppress(RequestError):
        PictureReader(100).decode(bytes(data), "image")


def test_writes_png_exactly_and_the_others_nearly() -> None:
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    for encoding, error in (("png", 0), ("jpeg", 8), ("webp", 20)):
        picture = Image.open(io.BytesIO(encode(smooth, encoding)))
        assert picture.format == encoding.upper()
        assert np.abs(np.asarray(picture, np.int16) - smooth).max() <= error
        assert base64.b64decode(encode_base64(smooth, encoding)) == encode(smooth, encoding)


def test_a_png_of_any_size_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads what was written without it."""
    monkeypatch.setattr(Image.Image, "save", None)
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 7), (5, 1), (37, 64)):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        picture = Image.open(io.BytesIO(encode(pixels)))
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_a_png_says_of_itself_what_it_is_told() -> None:
    data = encode(Image.fromarray(PIXELS), "png", {"parameters": "a — b\nSteps: 20"})
    assert Image.open(io.BytesIO(data)).text == {"parameters": "a — b\nSteps: 20"}
