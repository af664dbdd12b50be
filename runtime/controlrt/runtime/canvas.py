"""What a run starts from: noise, or a picture with noise, all of it or what a mask says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError, about
from controlrt.runtime.fitting import Resize
from controlrt.runtime.manifest import Model
from controlrt.runtime.noise import Draws
from controlrt.runtime.pictures import Picture, pictures_of_prompts, to_mask, to_planes
from controlrt.runtime.samplers import SamplerTable

Array = NDArray[np.float32]
Encode = Callable[[Array], tuple[Array, Array]]
"""A picture (1, height, width, 3) in [0, 1] to mean and standard deviation of its latents."""
DEFAULT_STRENGTH = 0.8
DRAWN = np.float32(0.5)
"""From this on a mask says that a pixel is drawn anew."""
GREY = np.float32(0.5)
"""What stands in a picture for what is drawn anew: zero, where pictures go from -1 to 1."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The pictures that a call starts from, checked: one for all pictures, or one per prompt."""

    pictures: Array
    """(1, prompts or batch, height, width, 3) in [0, 1]; or the same of latents, (..., channels, height/8, width/8)."""
    encoded: bool = False
    """Whether ``pictures`` are latents."""
    masks: Array | None
    """(1 or prompts, height, width), 1 where the picture is drawn anew, else 0; None to draw all of it anew."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The buffers of one run that depend on where it starts, and the latents at its start."""

    latents: Array
    """(batch, channels, height/8, width/8), as the sampler starts from."""
    mask: Array | float = 1.0
    """(batch, 1, height/8, width/8)."""
    known: Array | float = 0.0
    """(batch, 2, channels, height/8, width/8): the known picture's latents, and noise."""
    inpaint: Array | None = None
    """(batch, 1 + channels, height/8, width/8): the mask, and the masked picture's latents."""


def run_strength(source: bool, mask: bool, strength: float | None) -> float | None:
    """The strength that a sampler's table is compiled for; None where a run starts from noise alone.

    That is text to image, and inpainting at strength 1, its default; picture to picture has diffusers' 0.8.
    """
    if not source or (mask and strength in (None, 1)):
        return None
    return DEFAULT_STRENGTH if strength is None else strength


def read_source(
    init_image: Picture | Sequence[Picture] | None,
    mask_image: Picture | Sequence[Picture] | None,
    *,
    strength: float | None,
    latents: tuple[int, ...],
    width: int,
    height: int,
    prompts: int,
    resize: Resize | None,
) -> Source | None:
    """The pictures that a call starts from; None for text to image.

    Args:
        init_image, mask_image, strength, width, height, resize: as the pipeline's.
        latents: shape of the run's latents, which ``init_image`` may have instead of pixels.
        prompts: how many.

    Raises:
        PictureError: unreadable, of another size, or another number of them than prompts.
        ParameterError: a mask or a strength without a picture.
    """
    if init_image is None:
        for name, value in (("mask_image", mask_image), ("strength", strength)):
            if value is not None:
                found = value if name == "strength" else "a picture"
                raise ParameterError(name, found, "left out where there is no init_image (--init) to start from")
        return None
    if isinstance(init_image, np.ndarray) and init_image.ndim == 4:
        return _latent_source(init_image, mask_image, latents, prompts)
    batch = latents[0]
    with about("init_image"):
        pictures = [
            to_planes(each, width, height, "init_image", resize)
            for each in pictures_of_prompts(init_image, "init_image", prompts, batch)
        ]
    if mask_image is None:
        return Source(pictures=np.stack(pictures), masks=None)
    with about("mask_image"):
        masks = [
            to_mask(each, width, height, "mask_image", resize)
            for each in pictures_of_prompts(mask_image, "mask_image", prompts, batch)
        ]
    return Source(pictures=np.stack(pictures), masks=(np.stack(masks) >= DRAWN).astype(np.float32))


def _latent_source(init_image: NDArray[Any], mask_image: object, latents: tuple[int, ...], prompts: int) -> Source:
    """Latents to start from, as another call of the pipeline gave them."""
    if init_image.shape[1:] != latents[1:] or len(init_image) not in (1, prompts, latents[0]):
        found, allowed = f"an array of shape {init_image.shape}", f"a picture, or latents of shape {latents}"
        raise ParameterError("init_image", found, allowed)
    if not np.isfinite(init_image).all():
        raise ParameterError("init_image", "latents that are not finite", "finite")
    if mask_image is not None:
        raise ParameterError("init_image", "latents", "a picture where there is a mask_image")
    return Source(pictures=init_image.astype(np.float32), encoded=True, masks=None)


def prepare_canvas(
    model: Model,
    source: Source | None,
    table: SamplerTable,
    draws: Draws,
    encode: Encode,
    shape: tuple[int, ...],
    latents: Array | None,
    *,
    pure_noise: bool,
    sees_mask: bool,
) -> Canvas:
    """Draws the noise and encodes the pictures, in the order in which diffusers' pipelines draw.

    Args:
        model: the bundle's.
        source: None for text to image.
        table: the sampler's.
        draws: the seed's generators.
        encode: the VAE's encoder.
        shape: of the latents: (batch, channels, height/8, width/8).
        latents: standard normal noise in place of the seed's.
        pure_noise: whether the run starts from noise alone even though there is a picture (inpainting, strength 1).
        sees_mask: whether the UNet was made for inpainting, and sees mask and masked picture beside the latents.
    """
    if source is None:
        noise = draws.randn(shape) if latents is None else latents
        return Canvas(latents=noise * np.float32(table.initial[1]))
    batch = shape[0]
    needed = not sees_mask or not pure_noise  # of the picture as it is
    sample = _Sampling(draws, encode, batch, each=source.masks is None)
    known = None
    if source.encoded:
        known = _repeated(source.pictures, batch)
    elif needed:
        known = sample(source.pictures)
    noise = draws.randn(shape) if latents is None else latents
    start = noise * np.float32(table.initial[1])
    if known is not None and not pure_noise:
        start = start + known * np.float32(table.initial[0])
    if source.masks is None:
        return Canvas(latents=start)
    factor = model.vae_scale_factor
    mask = _repeated(source.masks[:, None, ::factor, ::factor], batch)  # nearest neighbours
    masked = sample(np.where(source.masks[..., None] > 0, GREY, source.pictures))  # diffusers draws for it in any case
    if sees_mask:
        return Canvas(latents=start, inpaint=np.concatenate([mask, masked], axis=1))
    return Canvas(latents=start, mask=mask, known=np.stack([known, noise], axis=1))  # type: ignore[list-item]


class _Sampling:
    """Latents of pictures as the VAE's posterior gives them, with noise of the seed: (batch, ...)."""

    def __init__(self, draws: Draws, encode: Encode, batch: int, *, each: bool) -> None:
        """``each``: with one generator per picture, every picture of the batch is drawn by its own."""
        self._draws, self._encode, self._batch, self._each = draws, encode, batch, each

    def __call__(self, pictures: Array) -> Array:
        encoded = [self._encode(picture[None]) for picture in pictures]
        mean, std = (np.concatenate(part) for part in zip(*encoded, strict=True))
        if self._each and not self._draws.single:
            mean, std = _repeated(mean, self._batch), _repeated(std, self._batch)
        return _repeated(mean + std * self._draws.randn(mean.shape), self._batch)


def _repeated(rows: Array, batch: int) -> Array:
    """Every prompt's row for each of its pictures."""
    return np.repeat(rows, batch // len(rows), axis=0)
