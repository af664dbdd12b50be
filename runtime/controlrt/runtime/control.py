"""How each control of a call acts: its hint, its scale, its window, as the bytes the step programs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError
from controlrt.runtime.fitting import Resize
from controlrt.runtime.manifest import Control
from controlrt.runtime.pictures import Picture, to_hint, to_mask
from controlrt.runtime.scales import (
    ControlMode,
    GuessMode,
    LayerWeights,
    Scale,
    check_guess_mode,
    control_mode,
    is_number,
    layer_weights,
    mode_weights,
    over_steps,
)

Pictures = Picture | Sequence[Picture]
PerControl = float | Sequence[float] | Mapping[str, float]
PerControlScale = Scale | Sequence[Scale] | Mapping[str, Scale]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What a call says of its controls; each for all of them, a list in their order, or a mapping by name."""

    scale: PerControlScale = 1.0
    start: PerControl = 0.0
    end: PerControl = 1.0
    mode: str | Sequence[str] | Mapping[str, str] = "balanced"
    weights: LayerWeights | Mapping[str, LayerWeights | None] | None = None
    region: Picture | Mapping[str, Picture] | None = None
    guess_mode: GuessMode = False


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One control in one call."""

    control: Control
    hint: NDArray[np.float32]
    """(batch, channels, height, width), in [0, 1]; for inpainting -1 where the picture is drawn anew."""
    scale: NDArray[np.float64]
    """(steps, batch, layers)."""
    start: float
    end: float
    conditional: bool
    """Whether it acts on the conditional rows alone."""
    region: NDArray[np.float32] | None
    """Where it acts: (height, width), in [0, 1]; everywhere where None."""

    def active(self, step: int) -> bool:
        """Whether it runs at ``step``: diffusers' window rule, and not at all with scale 0."""
        return bool(self.scale[step].any()) and in_window(step, len(self.scale), self.start, self.end)

    def conditioning_scale(self, guided: bool) -> NDArray[np.float32]:
        """Scale of each step, row and residual: (steps, rows, layers)."""
        if not guided:
            return self.scale.astype(np.float32)
        unconditional = np.zeros_like(self.scale) if self.conditional else self.scale
        return np.concatenate([unconditional, self.scale], axis=1).astype(np.float32)


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
    guidance: Guidance,
    *,
    steps: int,
    width: int,
    height: int,
    prompts: int,
    images_per_prompt: int,
    resize: Resize | None,
) -> list[ControlUse]:
    """Checks what a call says of its controls and prepares their hints.

    Args:
        known: the bundle's controls.
        image: control pictures by control name, or of the only control.
        guidance: how they act.
        steps: calls of the model.
        width, height, prompts, images_per_prompt, resize: as the pipeline's.

    Raises:
        UnknownNameError: a control that the bundle does not have.
        PictureError: a missing, unreadable or ill-sized control picture.
        ParameterError: a scale, start or end that is not finite or out of range.
    """
    guess = check_guess_mode(guidance.guess_mode)
    if image is None:
        for parameter, value in (
            ("controlnet_conditioning_scale", guidance.scale),
            ("control_guidance_start", guidance.start),
            ("control_guidance_end", guidance.end),
        ):
            if isinstance(value, float) and not is_number(value):
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
            hint = "add it with: build-engines --controlnet NAME=SOURCE or --adapter NAME=SOURCE"
            raise UnknownNameError("control", name, by_name, hint)
        control = by_name[name]
        listed = list(pictures) if isinstance(pictures, Sequence) else [pictures]
        if len(listed) not in (1, prompts):
            raise PictureError(
                f"control {name!r} has {len(listed)} pictures for {prompts} prompts; give 1 or {prompts}"
            )
        hints = np.stack([to_hint(picture, width, height, name, resize, control.channels) for picture in listed])
        repeats = images_per_prompt if len(listed) == prompts else prompts * images_per_prompt
        picked = _Picked(guidance, tuple(image), position)
        start, end = picked.number("control_guidance_start", "start"), picked.number("control_guidance_end", "end")
        check_window("control_guidance", start, end)
        scale = over_steps(
            "controlnet_conditioning_scale",
            picked.value("controlnet_conditioning_scale", "scale"),
            steps,
            prompts * images_per_prompt,
            control.layers,
        )
        if control.kind == "adapter" and (scale != scale[:1, :1]).any():
            wanted = f"one number for adapter {name!r}, whose features are summed before the first step"
            raise ParameterError("controlnet_conditioning_scale", "a curve or an array", wanted)
        weights, conditional = mode_weights(control, guess, picked.mode())
        region = picked.by_name("control_region", guidance.region)
        if region is not None and control.kind == "adapter":
            raise ParameterError("control_region", name, "left out for adapters")
        uses.append(
            ControlUse(
                control=control,
                hint=np.repeat(hints, repeats, axis=0),
                scale=scale
                * weights
                * layer_weights(control, picked.by_name("control_layer_weights", guidance.weights)),
                start=start,
                end=end,
                conditional=conditional,
                region=None if region is None else to_mask(region, width, height, f"control_region of {name}", resize),
            )
        )
    return sorted(uses, key=lambda use: list(by_name).index(use.control.name))  # one plan, whatever the order


@dataclass(frozen=True)
class _Picked:
    """What is said of one control: one value for all, a list in order, or a mapping by name."""

    guidance: Guidance
    controls: tuple[str, ...]
    position: int

    @property
    def name(self) -> str:
        return self.controls[self.position]

    def value(self, parameter: str, field: str) -> Any:
        """The value of ``field``, whatever it is."""
        value = getattr(self.guidance, field)
        if isinstance(value, Mapping):
            self._check_names(parameter, value)
            if self.name not in value:
                raise ParameterError(parameter, dict(value), f"given for control {self.name!r} too")
            return value[self.name]
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != len(self.controls):
                allowed = f"one value or {len(self.controls)}, one for each control"
                raise ParameterError(parameter, list(value), allowed)
            return value[self.position]
        return value

    def number(self, parameter: str, field: str) -> float:
        """The value of ``field``, which is one finite number."""
        value = self.value(parameter, field)
        if not is_number(value):
            raise ParameterError(parameter, value, "a finite number")
        return float(value)

    def mode(self) -> ControlMode:
        """The control mode."""
        return control_mode(self.value("control_mode", "mode"))

    def by_name(self, parameter: str, value: Any) -> Any:
        """``value`` for all controls, or this one's out of a mapping, which need not have it."""
        if not isinstance(value, Mapping):
            return value
        self._check_names(parameter, value)
        return value.get(self.name)

    def _check_names(self, parameter: str, value: Mapping[str, Any]) -> None:
        for key in value:
            if key not in self.controls:
                raise UnknownNameError(f"control in {parameter}", key, self.controls)
