"""Shape profiles: which sizes, batches and lengths of prompt a bundle serves, as in ``512x512`` or ``512-1024x512``."""

from __future__ import annotations

import operator
import re

import msgspec

from controlrt.runtime.errors import ParameterError, ProfileError, about

SIDE_STEP = 64
MIN_SIDE, MAX_SIDE = 64, 4096
MAX_BATCH = 63
CHUNK_TOKENS = 77
"""What a CLIP text encoder reads at once, start and end token included."""
MAX_PROMPT_CHUNKS = 16
MAX_IMAGES = 8
"""Pictures that one IP-Adapter is shown at once."""
VAE_TILE_STEP = 256
"""Tiles overlap by a quarter, so the rests at a picture's edges are multiples of 64 like every side."""

_PATTERN = re.compile(r"(\d+)(?:-(\d+))?x(\d+)(?:-(\d+))?", re.ASCII)


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An inclusive range of whole numbers."""

    low: int
    high: int

    def __contains__(self, value: int) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Picture widths and heights, in pixels."""

    width: Range
    height: Range

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class ShapeProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes, batches and prompts of a bundle. The first size's upper end is the default picture size."""

    sizes: tuple[Size, ...]
    batch: Range = Range(1, 1)
    prompt_chunks: Range = Range(1, 1)
    """How many chunks of 75 tokens, each framed by a start and an end token, a prompt has."""
    vae_tile: int | None = None
    """The side of the largest picture that the VAE takes at once; larger ones go through it in tiles of this side."""

    @classmethod
    def parse(cls, text: str, batch: str = "1", prompt_chunks: str = "1", vae_tile: int | None = None) -> ShapeProfile:
        """Parses ``512x512``, ``768x512`` (width x height), ``512-1024x512`` or a comma-separated list.

        Raises:
            ProfileError: malformed, or a side that is not a multiple of 64 from 64 to 4096.
            ParameterError: a batch or a number of prompt chunks outside its range, or a tile of another side than a
                multiple of 256.
        """
        if vae_tile is not None and (vae_tile % VAE_TILE_STEP or not VAE_TILE_STEP <= vae_tile <= MAX_SIDE):
            raise ParameterError("--vae-tile", vae_tile, f"a multiple of {VAE_TILE_STEP} up to {MAX_SIDE}")
        return cls(
            sizes=tuple(_parse_size(part.strip()) for part in text.split(",")),
            batch=_parse_range("batch", batch, MAX_BATCH),
            prompt_chunks=_parse_range("prompt_chunks", prompt_chunks, MAX_PROMPT_CHUNKS),
            vae_tile=vae_tile,
        )

    def __str__(self) -> str:
        return ",".join(str(size) for size in self.sizes)

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height used when a call names none."""
        return self.sizes[0].width.high, self.sizes[0].height.high

    @property
    def tokens(self) -> Range:
        """How many tokens UNet and ControlNets read."""
        return Range(CHUNK_TOKENS * self.prompt_chunks.low, CHUNK_TOKENS * self.prompt_chunks.high)

    @property
    def widths(self) -> Range:
        """The hull of all widths."""
        return Range(min(size.width.low for size in self.sizes), max(size.width.high for size in self.sizes))

    @property
    def heights(self) -> Range:
        """The hull of all heights."""
        return Range(min(size.height.low for size in self.sizes), max(size.height.high for size in self.sizes))

    def of(self, part: str) -> ShapeProfile:
        """What ``part`` runs at: where there are tiles, the VAE at everything from one block to a whole tile."""
        if self.vae_tile is None or not part.startswith("vae_"):
            return self
        sides = Range(SIDE_STEP, self.vae_tile)
        return msgspec.structs.replace(self, sizes=(Size(width=sides, height=sides),))

    def check(self, width: int, height: int, batch: int) -> None:
        """Raises ProfileError or ParameterError unless the bundle serves this size and batch."""
        for name, side in (("width", width), ("height", height)):
            try:
                whole = operator.index(side)
            except TypeError:
                raise ParameterError(name, side, f"a multiple of {SIDE_STEP}") from None
            if whole % SIDE_STEP or whole < MIN_SIDE:
                with about(name):
                    raise ProfileError(f"{name} {side} is not a multiple of {SIDE_STEP}; nearest: {_nearest(whole)}")
        if not any(width in size.width and height in size.height for size in self.sizes):
            with about("height" if any(width in size.width for size in self.sizes) else "width"):
                raise ProfileError(
                    f"{width}x{height} is not in the bundle's profile {self}; "
                    f"build one that has it: build-engines --profile {width}x{height}"
                )
        if batch not in self.batch:
            raise ParameterError(
                "batch (prompts x num_images_per_prompt)",
                batch,
                f"within the bundle's {self.batch}; for more: build-engines --batch 1-{max(batch, 1)}",
            )


def _parse_size(text: str) -> Size:
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ProfileError(
            f"profile {text!r} is not WIDTHxHEIGHT; examples: 512x512, 768x512, 512-1024x512-1024, 512x512,768x768"
        )
    low_width, high_width, low_height, high_height = match.groups()
    return Size(width=_parse_sides(low_width, high_width, text), height=_parse_sides(low_height, high_height, text))


def _parse_sides(low: str, high: str | None, text: str) -> Range:
    sides = Range(int(low), int(high or low))
    for side in (sides.low, sides.high):
        if side % SIDE_STEP or not MIN_SIDE <= side <= MAX_SIDE:
            raise ProfileError(
                f"profile {text!r}: side {side} is not a multiple of {SIDE_STEP} "
                f"from {MIN_SIDE} to {MAX_SIDE}; nearest: {_nearest(side)}"
            )
    if sides.low > sides.high:
        raise ProfileError(f"profile {text!r}: {low}-{high} runs backwards; write {high}-{low}")
    return sides


def _parse_range(name: str, text: str, largest: int) -> Range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip(), re.ASCII)
    if match is None:
        raise ParameterError(name, text, "a number or a range such as 1-4")
    found = Range(int(match[1]), int(match[2] or match[1]))
    if not 1 <= found.low <= found.high <= largest:
        raise ParameterError(name, text, f"from 1 to {largest}, low end first")
    return found


def _nearest(side: int) -> str:
    below = min(max(side // SIDE_STEP * SIDE_STEP, MIN_SIDE), MAX_SIDE)
    above = min(max(below + SIDE_STEP, MIN_SIDE), MAX_SIDE)
    return str(below) if below == above or side < MIN_SIDE else f"{below} or {above}"
