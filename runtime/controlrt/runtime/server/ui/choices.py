"""What somebody has chosen on the page, as the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from PIL import Image

from controlrt.runtime.errors import ParameterError
from controlrt.runtime.profile import SIDE_STEP, Range, ShapeProfile


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Everything that one picture is drawn from but its control picture.

    Raises:
        ParameterError: a number that was left empty.
    """

    bundle: str
    prompt: str
    negative_prompt: str = ""
    control: str | None = None
    """None where the prompt alone says what is drawn."""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    sampler: str | None = None
    """The model's own where None."""
    steps: int = 20
    guidance: float = 7.5
    seed: int = 0
    width: int
    height: int
    vae_tiling: bool = False
    """Whether the bundle's VAE takes large pictures in tiles."""

    def __post_init__(self) -> None:
        for name in ("scale", "start", "end", "steps", "guidance", "seed"):
            if getattr(self, name) is None:
                raise ParameterError(name, "empty", "a number")

    def arguments(self, picture: Image.Image | None = None) -> dict[str, Any]:
        """Arguments of ``ControlNetPipeline``, without those that would say what it does anyway.

        Args:
            picture: the control picture; the call is written without ``image`` where None.
        """
        arguments: dict[str, Any] = {"prompt": self.prompt}
        if self.negative_prompt:
            arguments["negative_prompt"] = self.negative_prompt
        if self.control is not None:
            if picture is not None:
                arguments["image"] = {self.control: picture}
            arguments["controlnet_conditioning_scale"] = self.scale
            if self.start > 0:
                arguments["control_guidance_start"] = self.start
            if self.end < 1:
                arguments["control_guidance_end"] = self.end
        if self.sampler is not None:
            arguments["scheduler"] = self.sampler
        if self.vae_tiling:
            arguments["vae_tiling"] = True
        return arguments | {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
        }


def sizes(profile: ShapeProfile, most: int = 64) -> list[str]:
    """``WIDTHxHEIGHT`` of a profile, its default first, and the nearest to it before others; ``most`` at most."""
    width, height = profile.default_size
    offered = {pair for size in profile.sizes for pair in product(_sides(size.width), _sides(size.height))}
    nearest = sorted(offered, key=lambda pair: (abs(pair[0] - width) + abs(pair[1] - height), pair))
    return [f"{width}x{height}" for width, height in nearest[:most]]


def _sides(sides: Range) -> range:
    return range(sides.low, sides.high + 1, SIDE_STEP)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height.

    Raises:
        ParameterError: anything but ``WIDTHxHEIGHT``.
    """
    width, _, height = (text or "").strip().lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ParameterError("size", text, "WIDTHxHEIGHT, such as 512x512")
    return int(width), int(height)


def differences(first: Choices, second: Choices) -> Mapping[str, tuple[Any, Any]]:
    """What differs, by name."""
    names = Choices.__dataclass_fields__
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
