"""How each ControlNet of a call acts: its hint, its scale, its window, as the bytes the step programs read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError
from controlrt.runtime.fitting import Resize
from controlrt.runtime.manifest import Control
from controlrt.runtime.pictures import Picture, to_hint

Pictures = Picture | Sequence[Picture]
PerControl = float | Sequence[float] | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One ControlNet in one call."""

    control: Control
    hint: NDArray[np.float32]
    """(batch, 3, height, width), in [0, 1], or -1 where an inpainting ControlNet shall paint."""
    scale: float
    start: float
    end: float

    def active(self, step: int, steps: int) -> bool:
        """Whether it runs at ``step`` of ``steps``: diffusers' window rule, and not at all with scale 0."""
        return self.scale != 0 and in_window(step, steps, self.start, self.end)

    def conditioning_scale(self, batch: int, guided: bool, guess_mode: bool) -> NDArray[np.float32]:
        """Scale of each row and residual: (rows, layers).

        Guess mode as in diffusers: layers rise from 0.1 to 1 on a log scale, and the unconditional rows get no control.
        """
        layers = np.full(self.control.layers, self.scale, np.float64)
        if guess_mode:
            layers *= np.logspace(-1, 0, self.control.layers)
        conditional = np.tile(layers, (batch, 1))
        if not guided:
            return conditional.astype(np.float32)
        unconditional = np.zeros_like(conditional) if guess_mode else conditional
        return np.concatenate([unconditional, conditional]).astype(np.float32)


def in_window(step: int, steps: int, start: float, end: float) -> bool:
    """Whether ``step`` of ``steps`` lies in a window given in fractions, by diffusers' rule."""
    return not (step / steps < start or (step + 1) / steps > end)


def check_window(kind: str, start: float, end: float) -> None:
    """Raises ParameterError unless ``kind``, such as ``control_guidance``, has a window it can act in."""
    for name, value in ((f"{kind}_start", start), (f"{kind}_end", end)):
        if not 0 <= value <= 1:
            raise ParameterError(name, value, "a fraction of the steps, from 0 to 1")
    if start >= end:
        raise ParameterError(f"{kind}_start", start, f"less than {kind}_end ({end})")


def resolve_controls(
    known: Sequence[Control],
    image: Pictures | Mapping[str, Pictures] | None,
    *,
    scale: PerControl,
    start: PerControl,
    end: PerControl,
    width: int,
    height: int,
    prompts: int,
    images_per_prompt: int,
    resize: Resize | None,
) -> list[ControlUse]:
    """Checks what a call says of its ControlNets and prepares their hints.

    Raises:
        UnknownNameError: a control that the bundle does not have.
        PictureError: a missing, unreadable or ill-sized control picture.
        ParameterError: a scale, start or end that is not finite or out of range.
    """
    if image is None:
        for parameter, value in (
            ("controlnet_conditioning_scale", scale),
            ("control_guidance_start", start),
            ("control_guidance_end", end),
        ):
            if isinstance(value, float) and not math.isfinite(value):
                raise ParameterError(parameter, value, "a finite number")
        return []
    if not isinstance(image, Mapping):
        if len(known) != 1:
            names = ", ".join(control.name for control in known) or "none"
            raise PictureError(f"the bundle has controls {names}; say which one: image={{NAME: picture}}")
        image = {known[0].name: image}
    by_name = {control.name: control for control in known}
    uses = []
    for position, (name, pictures) in enumerate(image.items()):
        if name not in by_name:
            raise UnknownNameError("control", name, by_name, "add it with: build-engines --controlnet NAME=SOURCE")
        control = by_name[name]
        listed = list(pictures) if isinstance(pictures, Sequence) else [pictures]
        if len(listed) not in (1, prompts):
            raise PictureError(
                f"control {name!r} has {len(listed)} pictures for {prompts} prompts; give 1 or {prompts}"
            )
        hints = np.stack([to_hint(picture, width, height, name, resize) for picture in listed])
        repeats = images_per_prompt if len(listed) == prompts else prompts * images_per_prompt
        window = (
            _pick(start, "control_guidance_start", image, position),
            _pick(end, "control_guidance_end", image, position),
        )
        check_window("control_guidance", *window)
        uses.append(
            ControlUse(
                control=control,
                hint=np.repeat(hints, repeats, axis=0),
                scale=_pick(scale, "controlnet_conditioning_scale", image, position),
                start=window[0],
                end=window[1],
            )
        )
    return sorted(uses, key=lambda use: list(by_name).index(use.control.name))  # one plan, whatever the order


def _pick(value: PerControl, parameter: str, controls: Mapping[str, Pictures], position: int) -> float:
    """The value for the control at ``position``: one for all, a list in order, or a mapping by name."""
    name = list(controls)[position]
    if isinstance(value, Mapping):
        for key in value:
            if key not in controls:
                raise UnknownNameError(f"control in {parameter}", key, controls)
        if name not in value:
            raise ParameterError(parameter, dict(value), f"given for control {name!r} too")
        value = value[name]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(controls):
            raise ParameterError(parameter, list(value), f"one number or {len(controls)}, one for each control")
        value = value[position]
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ParameterError(parameter, value, "a finite number")
    return float(value)
