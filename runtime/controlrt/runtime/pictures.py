"""Pictures in and out: files of any mode become upright RGB, RGB becomes hint tensors, outputs become PIL."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from controlrt.runtime.errors import OutputError, PictureError
from controlrt.runtime.fitting import RESIZES, Resize, fit, fit_masked
from controlrt.runtime.storage import atomic_file, check_writable

MAX_PIXELS = 64_000_000
WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""How bright red, green and blue are (ITU-R BT.601), as Pillow has it."""
MASKED = -1
"""What a float control picture holds where an inpainting ControlNet shall paint."""
Picture = Image.Image | NDArray[np.uint8] | NDArray[np.float32]


def open_picture(path: str | Path, *, keep_mode: bool = False) -> Image.Image:
    """Reads a picture file as upright 8-bit RGB; see ``to_rgb`` for what happens to other modes.

    Args:
        path: the file.
        keep_mode: leaves the picture in its own mode, upright; for depth pictures of 16 bits.

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
                return ImageOps.exif_transpose(picture) if keep_mode else to_rgb(picture)
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


def _grey_levels(picture: Image.Image) -> NDArray[np.float64]:
    """A grey picture of more than 8 bits in the levels of 8, not rounded; 65535 is 255."""
    values = np.asarray(picture, np.float64)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and values.max(initial=0) > 255):
        return values / 257
    return values


def open_control(path: str | Path) -> Picture:
    """Reads a control picture: a picture file, or what ``save_control`` wrote as ``.npy``.

    Raises:
        PictureError: as ``open_picture``, or a file that holds no array of numbers.
    """
    path = Path(path)
    if path.suffix.lower() != ".npy":
        return open_picture(path)
    try:
        array: Picture = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise PictureError(f"{path} does not exist") from None
    except (ValueError, OSError, EOFError) as error:
        raise PictureError(f"{path} is not an array that NumPy can read ({error})") from None
    return array


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright 8-bit RGB: turned by its EXIF orientation, transparency over black, grey and palette expanded."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
        upright = Image.fromarray(np.clip(np.round(_grey_levels(upright)), 0, 255).astype(np.uint8))
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return upright.convert("RGB")


def to_depth(picture: Picture) -> NDArray[np.float32]:
    """(height, width) in [0, 1] with all bits that the picture has: depth is often kept in 16 of them.

    Takes what ``to_hint`` takes, and arrays of uint16. Colours count by their luma.

    Raises:
        PictureError: another kind of object or value.
    """
    if isinstance(picture, Image.Image) and (picture.mode.startswith("I;16") or picture.mode in ("I", "F")):
        values = _grey_levels(ImageOps.exif_transpose(picture))
        return (np.clip(values, 0, 255) / 255).astype(np.float32)
    if isinstance(picture, np.ndarray):
        planes = _planes(picture)
        if planes.ndim == 3 and planes.shape[2] == 1 and 0 not in planes.shape:
            grey = planes[..., 0]
            if grey.dtype == np.uint16:
                return (grey / 65535).astype(np.float32)
            if np.issubdtype(grey.dtype, np.floating) and ((grey >= 0) & (grey <= 1)).all():
                return grey.astype(np.float32)
    luma = np.asarray(as_rgb(picture, "the depth picture"), np.float32) @ LUMA
    depth: NDArray[np.float32] = np.clip(luma / np.float32(255), 0, 1)
    return depth


def to_hint(
    picture: Picture, width: int, height: int, name: str, resize: Resize | None = None, channels: int = 3
) -> NDArray[np.float32]:
    """A control picture as its network takes it: (channels, height, width), float32 in [0, 1], or -1 where masked.

    One channel is the brightness.

    Takes a PIL picture, or an array (height, width), (height, width, 1), (height, width, 3) or (height, width, 4),
    uint8 in 0..255 or float in 0..1. Float arrays without transparency may hold -1 too, where an inpainting ControlNet
    shall paint; a pixel is masked where any of its channels is -1.

    Raises:
        PictureError: another kind of object or value, or another size while ``resize`` is None.
    """
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape == (height, width, channels):
        plain: NDArray[np.float32] = np.divide(picture.transpose(2, 0, 1), 255, dtype=np.float32)
        return plain
    exact = _exact_hint(picture, width, height)
    if exact is not None:
        if channels == 3:
            return exact
        return np.where((exact == MASKED).any(0, keepdims=True), np.float32(MASKED), exact.mean(0, keepdims=True))
    what = f"control picture {name!r}"
    mask = _mask_of(picture)
    rgb = as_rgb(picture if mask is None else np.where(mask[..., None], 0, _planes(picture)), what)
    if mask is not None and rgb.size != (width, height) and resize is not None:
        colours, mask = fit_masked(rgb, mask, width, height, resize)
        colours = colours if channels == 3 else colours @ LUMA[:, None]
    else:
        fitted = _fitted(rgb, width, height, what, resize)
        levels = np.asarray(fitted if channels == 3 else fitted.convert("L"), np.float32)
        colours = levels.reshape(height, width, channels) / np.float32(255)
    hint: NDArray[np.float32] = colours if mask is None else np.where(mask[..., None], np.float32(MASKED), colours)
    return hint.transpose(2, 0, 1)


def to_planes(
    picture: Picture, width: int, height: int, what: str, resize: Resize | None = None
) -> NDArray[np.float32]:
    """A picture as the VAE takes it: (height, width, 3), float32 in [0, 1].

    Raises:
        PictureError: another kind of object or value, or another size while ``resize`` is None.
    """
    exact = _exact_hint(picture, width, height)
    if exact is not None and exact.min() >= 0:
        return exact.transpose(1, 2, 0)
    return np.asarray(_fitted(as_rgb(picture, what), width, height, what, resize), np.float32) / np.float32(255)


def to_mask(picture: Picture, width: int, height: int, what: str, resize: Resize | None = None) -> NDArray[np.float32]:
    """A mask: (height, width), float32 in [0, 1], from the brightness of a picture.

    Raises:
        PictureError: another kind of object or value, or another size while ``resize`` is None.
    """
    exact = _exact_hint(picture, width, height)
    if exact is not None and exact.min() >= 0 and (exact == exact[:1]).all():
        grey_plane: NDArray[np.float32] = exact[0]
        return grey_plane
    grey = _fitted(as_rgb(picture, what), width, height, what, resize).convert("L")
    return np.asarray(grey, np.float32) / np.float32(255)


def _exact_hint(picture: Picture, width: int, height: int) -> NDArray[np.float32] | None:
    """A float array that fits as it is, without rounding to 8 bits; None where it must be converted or refused."""
    if not isinstance(picture, np.ndarray) or not np.issubdtype(picture.dtype, np.floating):
        return None
    planes = _planes(picture)
    if planes.shape not in ((height, width, 1), (height, width, 3)):
        return None
    if not (((planes >= 0) & (planes <= 1)) | (planes == MASKED)).all():
        return None
    return np.broadcast_to(planes, (height, width, 3)).transpose(2, 0, 1).astype(np.float32)


def _mask_of(picture: Picture) -> NDArray[np.bool_] | None:
    """(height, width): where a float array without transparency is -1; None where it nowhere is."""
    if not isinstance(picture, np.ndarray) or not np.issubdtype(picture.dtype, np.floating) or picture.ndim > 3:
        return None
    planes = _planes(picture)
    if planes.ndim != 3 or planes.shape[-1] not in (1, 3):
        return None
    mask: NDArray[np.bool_] = (planes == MASKED).any(axis=-1)
    return mask if mask.any() else None


def listed_pictures(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture or several as a list; text, which is no picture, is one, for ``as_rgb`` to refuse."""
    several = isinstance(pictures, Sequence) and not isinstance(pictures, (str, bytes))
    return list(pictures) if several else [pictures]  # type: ignore[arg-type, list-item]


def pictures_of_prompts(pictures: Picture | Sequence[Picture], what: str, prompts: int, batch: int) -> list[Picture]:
    """One picture for all prompts, one for each, or one for each of the ``batch`` pictures that are drawn.

    Raises:
        PictureError: another number of them.
    """
    listed = listed_pictures(pictures)
    allowed = sorted({1, prompts, batch})
    if len(listed) not in allowed:
        wanted = " or ".join(str(number) for number in allowed)
        of = "1 prompt" if prompts == 1 else f"{prompts} prompts"
        raise PictureError(f"{what} has {len(listed)} pictures for {of}; give {wanted}")
    return listed


def _planes(array: Any) -> NDArray[Any]:
    """With the channels as an axis, even where there is one."""
    planes: NDArray[Any] = array[..., None] if array.ndim == 2 else array
    return planes


def as_rgb(picture: Picture, what: str) -> Image.Image:
    """A PIL picture, or an array as ``to_hint`` takes it, as ``to_rgb`` gives it; ``what`` is for the message.

    Raises:
        PictureError: another kind of object or value.
    """
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if isinstance(picture, (str, Path)):
        name = str(picture)
        raise PictureError(f"{what} is the text {name!r}, not a picture; open the file: PIL.Image.open({name!r})")
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
    return fit(rgb, width, height, resize)


def to_pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pixels of float32 values in [0, 1], rounded as diffusers does."""
    return np.round(images * 255).astype(np.uint8)


def to_pil(images: NDArray[np.float32]) -> list[Image.Image]:
    """PIL pictures of (batch, height, width, 3) float32 values in [0, 1]."""
    return [Image.fromarray(image) for image in to_pixels(images)]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture, whole or not at all; the ending decides the format.

    Raises:
        OutputError: an unknown ending, or a place that cannot be written.
    """
    check_picture_path(path)
    with atomic_file(path) as partial:
        picture.save(partial)


def save_control(control: Picture, path: Path) -> None:
    """Writes a control picture: a picture file, or ``.npy`` for the float arrays of inpainting, which hold -1.

    Raises:
        OutputError: a place that cannot be written, or an ending that cannot hold it.
    """
    if isinstance(control, Image.Image):
        save_picture(control, path)
        return
    check_array_path(path)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, control)


def check_array_path(path: Path) -> None:
    """Raises OutputError where an array of floats could not be written."""
    if path.suffix.lower() != ".npy":
        raise OutputError(f"{path} cannot hold the -1 of masked pixels; use a name that ends in .npy")
    _check_place(path)


def check_picture_path(path: Path) -> None:
    """Raises OutputError where ``save_picture`` could not write, before any work is done for it."""
    if path.suffix.lower() not in WRITTEN:
        raise OutputError(f"{path} has no ending that names a picture format; use one of {', '.join(WRITTEN)}")
    _check_place(path)


def _check_place(path: Path) -> None:
    check_writable(path)
    if path.is_dir():
        raise OutputError(f"{path} is a directory; name a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} does not exist; make it with: mkdir -p {path.parent}")
