"""Pictures as requests and answers carry them: bytes of a file, base64, data URLs.

Nothing here reads a path or a URL. All of it is work for a thread (``asyncio.to_thread``), never for an event loop.
"""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from controlrt.runtime.errors import RequestError
from controlrt.runtime.server.png import write_png

Encoding = Literal["png", "jpeg", "webp"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Formats that requests may bring: those that clients send, and no others' decoders."""
MEDIA_TYPES: dict[Encoding, str] = {name: f"image/{name}" for name in ENCODINGS}
_SAVE_OPTIONS: dict[Encoding, dict[str, int]] = {
    "png": {"compress_type": zlib.Z_RLE},  # smaller than level 4 after PNG's filters, in 60% of its time
    "jpeg": {"quality": 95},
    "webp": {"quality": 90},
}


class PictureReader:
    """Reads the pictures of one request, as long as they have few enough pixels together."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = self._left = max_pixels

    def decode_text(self, text: str, parameter: str) -> Image.Image:
        """A picture from base64, or from a data URL of base64.

        Args:
            text: either.
            parameter: what the request calls the picture, for messages.

        Raises:
            RequestError: other text, or as ``decode``.
        """
        if text.startswith("data:"):
            head, comma, text = text.partition(",")
            if not comma or not head.endswith(";base64"):
                raise RequestError(
                    f"{parameter} is a data URL, but not of base64 (data:image/png;base64,...)", parameter
                )
        elif "://" in text[:16]:
            raise RequestError(
                f"{parameter} is a URL, and this server fetches nothing; send the picture's bytes as base64", parameter
            )
        try:
            data = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(f"{parameter} is neither base64 nor a data URL of base64", parameter) from None
        return self.decode(data, parameter)

    def decode(self, data: bytes, parameter: str) -> Image.Image:
        """A picture from the bytes of its file, upright and in its own mode.

        Args:
            data: a PNG, JPEG, WebP, BMP or GIF file.
            parameter: what the request calls the picture, for messages.

        Raises:
            RequestError: not such a file, a damaged one, or one with more pixels than are left.
        """
        try:
            with Image.open(io.BytesIO(data), formats=READ) as picture:
                pixels = picture.width * picture.height
                if pixels > self._left:
                    raise RequestError(self._too_large(parameter, f"{picture.width}x{picture.height}"), parameter)
                self._left -= pixels
                return ImageOps.exif_transpose(picture)
        except RequestError:
            raise
        except UnidentifiedImageError:
            raise RequestError(
                f"{parameter} is not a picture that can be read ({', '.join(READ)})", parameter
            ) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise RequestError(self._too_large(parameter, "far more"), parameter) from None
        except Exception as error:  # every decoder has exceptions of its own
            raise RequestError(f"{parameter} is damaged or cut short ({error})", parameter) from error

    def _too_large(self, parameter: str, found: str) -> str:
        return f"{parameter} has {found} pixels; all pictures of a request may have {self._max_pixels:,} together"


def encode(
    picture: NDArray[np.uint8] | Image.Image, encoding: Encoding = "png", text: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of a picture's file.

    Args:
        picture: (height, width, 3), or a PIL picture.
        encoding: its format.
        text: what a PNG says of itself, by keyword; other formats leave it out.
    """
    if encoding == "png" and not text and not isinstance(picture, Image.Image):
        return write_png(picture)
    written = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    options: dict[str, int | PngInfo] = dict(_SAVE_OPTIONS[encoding])
    if encoding == "png" and text:
        options["pnginfo"] = info = PngInfo()
        for keyword, value in text.items():
            info.add_itxt(keyword, value)
    buffer = io.BytesIO()
    written.save(buffer, encoding.upper(), **options)
    return buffer.getvalue()


def encode_base64(
    picture: NDArray[np.uint8] | Image.Image, encoding: Encoding = "png", text: Mapping[str, str] | None = None
) -> str:
    """As ``encode``, in base64."""
    return base64.b64encode(encode(picture, encoding, text)).decode("ascii")
