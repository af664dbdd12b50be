"""Pictures in and out: files of any mode become upright RGB, RGB becomes hint tensors, outputs become PIL."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from controlrt.runtime.errors import OutputError, ParameterError, PictureError
from controlrt.runtime.storage import atomic_file, check_writable

MAX_PIXELS = 64_000_000
WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
Resize = Literal["stretch", "crop", "pad"]
RESIZES: tuple[Resize, ...] = ("stretch", "crop", "pad")
Picture = Image.Image | NDArray[np.uint8] | NDArray[np.float32]


def open_picture(path: str | Path) -> Image.Image:
    """Reads a picture file as upright 8-bit RGB; see ``to_rgb`` for what happens to other modes.

    Raises:
        PictureError: missing, not a picture, truncated, or more than 64 million pixels.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit below is stricter
            with Image.open(path) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise PictureError(
                        f"{path} has {picture.width}x{picture.height} pixels; at most {MAX_PIXELS:,} are read; "
                        "make it smaller first"
                    )
                return to_rgb(picture)
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise PictureError(f"{path} is a directory; name a picture file") from None
    except UnidentifiedImageError:
        raise PictureError(f"{path} is not a picture that can be read (PNG, JPEG, WebP, ...)") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{path} unpacks to far more than {MAX_PIXELS:,} pixels; make it smaller first") from None
    except Exception as error:  # every decoder has exceptions of its own
        raise PictureError(f"{path} is damaged or cut short ({error}); save it again") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright 8-bit RGB: turned by its EXIF orientation, transparency over black, grey and palette expanded."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
        values = np.asarray(upright, np.float64)
        if upright.mode.startswith("I;16") or (upright.mode == "I" and values.max(initial=0) > 255):
            values = values / 257  # 65535 is white
        upright = Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return upright.convert("RGB")


def to_hint(
    picture: Picture, width: int, height: int, name: str, resize: Resize | None = None, channels: int = 3
) -> NDArray[np.float32]:
    """A control picture as the ControlNet takes it: (channels, height, width), float32 in [0, 1]; grey for one channel.

    Takes a PIL picture, or an array (height, width), (height, width, 1), (height, width, 3) or (height, width, 4),
    uint8 in 0..255 or float in 0..1.

    Raises:
        PictureError: another kind of object or value, or another size while ``resize`` is None.
    """
    exact = _exact_hint(picture, width, height)
    if exact is not None:
        return exact if channels == 3 else exact.mean(axis=0, keepdims=True)
    rgb = _fitted(_as_rgb(picture, f"control picture {name!r}"), width, height, f"control picture {name!r}", resize)
    fitted = rgb if channels == 3 else rgb.convert("L")
    planes = np.asarray(fitted, np.float32).reshape(height, width, channels)
    return planes.transpose(2, 0, 1) / np.float32(255)


def to_planes(
    picture: Picture, width: int, height: int, what: str, resize: Resize | None = None
) -> NDArray[np.float32]:
    """A picture as the VAE takes it: (height, width, 3), float32 in [0, 1].

    Raises:
        PictureError: another kind of object or value, or another size while ``resize`` is None.
    """
    exact = _exact_hint(picture, width, height)
    if exact is not None:
        return exact.transpose(1, 2, 0)
    return np.asarray(_fitted(_as_rgb(picture, what), width, height, what, resize), np.float32) / np.float32(255)


def to_mask(picture: Picture, width: int, height: int, what: str, resize: Resize | None = None) -> NDArray[np.float32]:
    """A mask: (height, width), float32 in [0, 1], from the brightness of a picture.

    Raises:
        PictureError: another kind of object or value, or another size while ``resize`` is None.
    """
    exact = _exact_hint(picture, width, height)
    if exact is not None and (exact == exact[:1]).all():
        grey_plane: NDArray[np.float32] = exact[0]
        return grey_plane
    grey = _fitted(_as_rgb(picture, what), width, height, what, resize).convert("L")
    return np.asarray(grey, np.float32) / np.float32(255)


def _exact_hint(picture: Picture, width: int, height: int) -> NDArray[np.float32] | None:
    """A float array that fits as it is, without rounding to 8 bits; None where it must be converted or refused."""
    if not isinstance(picture, np.ndarray) or not np.issubdtype(picture.dtype, np.floating):
        return None
    planes: NDArray[Any] = picture[..., None] if picture.ndim == 2 else picture
    if planes.shape not in ((height, width, 1), (height, width, 3)) or not ((planes >= 0) & (planes <= 1)).all():
        return None
    return np.broadcast_to(planes, (height, width, 3)).transpose(2, 0, 1).astype(np.float32)


def _as_rgb(picture: Picture, what: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if not isinstance(picture, np.ndarray):
        raise PictureError(f"{what} is a {type(picture).__name__}; give a PIL picture or NumPy array")
    array = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise PictureError(f"{what} has shape {picture.shape}; allowed: (height, width) with 1, 3 or 4 channels last")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PictureError(f"{what} is a float array with values outside 0..1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise PictureError(f"{what} has dtype {array.dtype}; allowed: uint8 in 0..255, float in 0..1")
    return to_rgb(Image.fromarray(array))


def _fitted(rgb: Image.Image, width: int, height: int, what: str, resize: Resize | None) -> Image.Image:
    if rgb.size == (width, height):
        return rgb
    if resize is None:
        raise PictureError(
            f"{what} is {rgb.width}x{rgb.height}, the output is {width}x{height}; give one of "
            f"that size, or let it be fitted with resize= (--resize) {', '.join(RESIZES)}"
        )
    return _fit(rgb, width, height, resize)


def _fit(picture: Image.Image, width: int, height: int, resize: Resize) -> Image.Image:
    if resize == "stretch":
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    if resize == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    if resize == "pad":
        return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS)
    raise ParameterError("resize", resize, f"one of {', '.join(RESIZES)}")


def to_pil(images: NDArray[np.float32]) -> list[Image.Image]:
    """PIL pictures of (batch, height, width, 3) float32 values in [0, 1], rounded as diffusers does."""
    return [Image.fromarray(image) for image in np.round(images * 255).astype(np.uint8)]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture, whole or not at all; the ending decides the format.

    Raises:
        OutputError: an unknown ending, or a place that cannot be written.
    """
    check_picture_path(path)
    with atomic_file(path) as partial:
        picture.save(partial)


def check_picture_path(path: Path) -> None:
    """Raises OutputError where ``save_picture`` could not write, before any work is done for it."""
    if path.suffix.lower() not in WRITTEN:
        raise OutputError(f"{path} has no ending that names a picture format; use one of {', '.join(WRITTEN)}")
    check_writable(path)
    if path.is_dir():
        raise OutputError(f"{path} is a directory; name a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} does not exist; make it with: mkdir -p {path.parent}")
