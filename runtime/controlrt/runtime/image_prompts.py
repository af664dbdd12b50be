"""What a call says of its IP-Adapters: the pictures that each is shown, and how strongly each acts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.clip_picture import clip_picture
from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError, about
from controlrt.runtime.manifest import IPAdapter
from controlrt.runtime.pictures import Picture, listed_pictures
from controlrt.runtime.profile import MAX_IMAGES
from controlrt.runtime.scales import Scale, over_steps

ImagePrompts = Picture | Sequence[Picture | Sequence[Picture]] | Mapping[str, Picture | Sequence[Picture]]
ImageScale = Scale | Sequence[Scale] | Mapping[str, Scale]

MAX_SCALE = 10.0
"""Far beyond what draws anything."""
_ADD = "add one with: build-engines --ip-adapter FILE"


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """One IP-Adapter in one call."""

    adapter: IPAdapter
    pictures: NDArray[np.float32]
    """(images, 3, side, side), as CLIP sees them; no images where the adapter is shown none."""
    digests: tuple[bytes, ...]
    """SHA-256 of each."""
    scale: NDArray[np.float64]
    """(steps, batch, layers); 0 where it is shown no picture."""

    def row_scale(self, guided: bool) -> NDArray[np.float32]:
        """Scale of each step, row and cross-attention: (steps, rows, layers)."""
        return np.tile(self.scale, (1, 2 if guided else 1, 1)).astype(np.float32)


def resolve_image_prompts(
    adapters: Sequence[IPAdapter], image: ImagePrompts | None, scale: ImageScale, *, steps: int, batch: int
) -> list[ImagePrompt]:
    """Checks what a call says of its IP-Adapters and prepares their pictures.

    Args:
        adapters: the bundle's.
        image: a picture of the only adapter, or several; a list of what each is shown, in the order of the bundle; or
            that by name.
        scale: one for all adapters, a list in the order of the bundle, or a mapping by name.
        steps: calls of the model.
        batch: pictures that are drawn.

    Returns:
        One for each of ``adapters``.

    Raises:
        PictureError: pictures that the bundle has no adapter for, that cannot be read, or are too many.
        UnknownNameError: an adapter that the bundle does not have.
        ParameterError: a scale that is not a finite number from 0 to 10, or of a wrong shape.
    """
    if not adapters and not (isinstance(scale, (int, float, Mapping)) and scale in (1, {})):
        raise ParameterError("ip_adapter_scale", scale, f"left out: the bundle has no IP-Adapter; {_ADD}")
    with about("ip_adapter_image"):
        shown = _by_name(adapters, image)
    return [
        _prompt(adapter, shown.get(adapter.name, []), _own_scale(adapters, number, scale), steps, batch)
        for number, adapter in enumerate(adapters)
    ]


def _prompt(adapter: IPAdapter, pictures: Sequence[Picture], scale: Scale, steps: int, batch: int) -> ImagePrompt:
    with about("ip_adapter_image"):
        if len(pictures) > MAX_IMAGES:
            raise PictureError(
                f"IP-Adapter {adapter.name!r} is shown {len(pictures)} pictures; at most {MAX_IMAGES} at once"
            )
        what = f"the picture of IP-Adapter {adapter.name!r}"
        squares = [clip_picture(picture, adapter.side, what) for picture in pictures]
    over = over_steps("ip_adapter_scale", scale, steps, batch, adapter.layers)
    if (over < 0).any() or (over > MAX_SCALE).any():
        found = float(over.min() if (over < 0).any() else over.max())
        raise ParameterError("ip_adapter_scale", found, f"a number from 0 to {MAX_SCALE:g}")
    return ImagePrompt(
        adapter=adapter,
        pictures=np.stack(squares) if squares else np.zeros((0, 3, adapter.side, adapter.side), np.float32),
        digests=tuple(hashlib.sha256(square.tobytes()).digest() for square in squares),
        scale=over if squares else np.zeros_like(over),
    )


def _by_name(adapters: Sequence[IPAdapter], image: ImagePrompts | None) -> dict[str, list[Picture]]:
    """The pictures of each adapter that is shown any."""
    if image is None:
        return {}
    names = [adapter.name for adapter in adapters]
    if not names:
        raise PictureError(f"ip_adapter_image is given, but the bundle has no IP-Adapter; {_ADD}")
    if isinstance(image, Mapping):
        for name in image:
            if name not in names:
                raise UnknownNameError("IP-Adapter", str(name), names, _ADD)
        return {name: listed_pictures(pictures) for name, pictures in image.items()}
    if len(names) == 1:
        nested = isinstance(image, Sequence) and len(image) == 1  # diffusers' form: a list with an entry per adapter
        return {names[0]: listed_pictures(image[0] if nested else image)}  # type: ignore[index, arg-type]
    if not isinstance(image, Sequence) or len(image) != len(names):
        wanted = f"a mapping by name, or a list of {len(names)}, one for each of {', '.join(names)}"
        found = f"{len(image)} pictures" if isinstance(image, Sequence) else type(image).__name__
        raise ParameterError("ip_adapter_image", found, wanted)
    return {name: listed_pictures(pictures) for name, pictures in zip(names, image, strict=True)}


def _own_scale(adapters: Sequence[IPAdapter], number: int, scale: Any) -> Scale:
    """What is said of one adapter: one value for all, a list in order, or a mapping by name."""
    names = [adapter.name for adapter in adapters]
    if isinstance(scale, Mapping):
        for name in scale:
            if name not in names:
                with about("ip_adapter_scale"):
                    raise UnknownNameError("IP-Adapter in ip_adapter_scale", str(name), names)
        return scale.get(names[number], 1.0)  # type: ignore[no-any-return]
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        if len(scale) != len(names):
            allowed = f"one value or {len(names)}, one for each IP-Adapter"
            raise ParameterError("ip_adapter_scale", list(scale), allowed)
        return scale[number]  # type: ignore[no-any-return]
    return scale  # type: ignore[no-any-return]
