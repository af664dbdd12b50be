"""How each control of a call acts: its hint, its scale, its window, as the bytes the step programs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.control_use import ControlHint, ControlUse, check_window
from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError, about
from controlrt.runtime.fitting import Resize
from controlrt.runtime.manifest import Control
from controlrt.runtime.pictures import Picture, pictures_of_prompts, to_hint, to_mask
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
        ParameterError: a scale, start or end that is not finite or out of range; anything that is said of controls and
            not the same for all, where no control has a picture; guess mode where no ControlNet has one.
    """
    guess = check_guess_mode(guidance.guess_mode)
    if image is None or (isinstance(image, Mapping) and not image):
        _refuse_idle(guidance, guess)
        return []
    if not isinstance(image, Mapping):
        names = [name for control in known for name in control.names]
        if len(names) != 1:
            shown = ", ".join(names) or "none"
            with about("image"):
                raise PictureError(f"the bundle has controls {shown}; say which one: image={{NAME: picture}}")
        image = {names[0]: image}
    by_name = {name: control for control in known for name in control.names}
    for name in image:
        if not isinstance(name, str):
            wanted = f"a mapping by names of controls: {', '.join(by_name) or 'the bundle has none'}"
            raise ParameterError("image", f"a mapping with the key {name!r}", wanted)
        if name not in by_name:
            hint = "add it with: build-engines --controlnet NAME=SOURCE or --adapter NAME=SOURCE"
            with about("image"):
                _refuse_untold_type(name, known)
                raise UnknownNameError("control", name, by_name, hint)
    networks = {name: by_name[name].name for name in image}
    said: dict[str, list[_Said]] = {}
    for name, pictures in image.items():
        control = by_name[name]
        with about("image"):
            listed = pictures_of_prompts(pictures, f"control {name!r}", prompts, prompts)
            hints = np.stack([to_hint(picture, width, height, name, resize, control.channels) for picture in listed])
        repeats = images_per_prompt if len(listed) == prompts else prompts * images_per_prompt
        picked = _Picked(guidance, networks, name)
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
        mode, conditional = mode_weights(control, guess, picked.mode())
        region = picked.by_name("control_region", guidance.region)
        if region is not None and control.kind == "adapter":
            raise ParameterError("control_region", name, "left out for adapters")
        said.setdefault(control.name, []).append(
            _Said(
                hint=ControlHint(
                    name=name,
                    picture=hints if repeats == 1 else np.repeat(hints, repeats, axis=0),
                    start=start,
                    end=end,
                    control_type=control.control_types.get(name.removeprefix(f"{control.name}.")),
                ),
                scale=scale,
                mode=mode,
                conditional=conditional,
                weights=layer_weights(control, picked.by_name("control_layer_weights", guidance.weights)),
                region=None if region is None else _region(region, width, height, name, resize),
            )
        )
    uses = [_use(control, said[control.name]) for control in known if control.name in said]
    if guess is not None and all(use.control.kind == "adapter" for use in uses):
        raise ParameterError("guess_mode", guidance.guess_mode, "left out where adapters alone act: it is ControlNets'")
    return uses


def _region(region: Picture, width: int, height: int, name: str, resize: Resize | None) -> NDArray[np.float32]:
    with about("control_region"):
        return to_mask(region, width, height, f"control_region of {name}", resize)


def _refuse_idle(guidance: Guidance, guess: str | None) -> None:
    """Raises ParameterError for what is said of controls in a call that has none.

    One number for all of them may stand there, of a scale or a window that is the same for all calls, if it could act.
    """
    nowhere = "left out where no control picture (image) is given"
    for parameter, value in (
        ("controlnet_conditioning_scale", guidance.scale),
        ("control_guidance_start", guidance.start),
        ("control_guidance_end", guidance.end),
    ):
        if is_number(value) or _says_nothing(value):
            continue
        if isinstance(value, np.ndarray) or callable(value):
            raise ParameterError(parameter, "an array or a function", nowhere)
        several = isinstance(value, (Mapping, Sequence)) and not isinstance(value, str)
        raise ParameterError(parameter, value, nowhere if several else "a finite number")
    if is_number(guidance.start) and is_number(guidance.end):
        check_window("control_guidance", guidance.start, guidance.end)
    listed_modes = isinstance(guidance.mode, (Mapping, Sequence)) and not isinstance(guidance.mode, str)
    with about("control_mode"):
        refused = bool(guidance.mode) if listed_modes else control_mode(guidance.mode) != "balanced"
    if refused:
        raise ParameterError("control_mode", guidance.mode, nowhere)
    if guess is not None:
        raise ParameterError("guess_mode", guidance.guess_mode, nowhere)
    if not _says_nothing(guidance.weights):
        raise ParameterError("control_layer_weights", guidance.weights, nowhere)
    if not _says_nothing(guidance.region):
        raise ParameterError("control_region", "a picture", nowhere)


def _says_nothing(value: object) -> bool:
    """Whether ``value`` is None, or a list or mapping without anything in it."""
    return value is None or (isinstance(value, (Mapping, Sequence)) and not isinstance(value, str) and not value)


def _refuse_untold_type(name: str, known: Sequence[Control]) -> None:
    """Raises UnknownNameError where ``name`` is a ControlNet Union's, without what its picture shows."""
    for control in known:
        if name == control.name and control.control_types:
            hint = f"{name} is a ControlNet Union: say what the picture shows"
            raise UnknownNameError("control", name, control.names, hint)


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What a call says of one control, or of one control picture of a ControlNet Union."""

    hint: ControlHint
    scale: NDArray[np.float64]
    """(steps, batch, layers)."""
    mode: NDArray[np.float64]
    weights: NDArray[np.float64]
    """Of the layers, as ``mode`` is: (layers,)."""
    conditional: bool
    region: NDArray[np.float32] | None


def _use(control: Control, said: Sequence[_Said]) -> ControlUse:
    """One use of all pictures of one control.

    The scale of a picture by itself is that of the residuals. Several of a ControlNet Union share the residuals, and
    each scale is that of a picture's features, as in diffusers.

    Raises:
        ParameterError: several that disagree on what acts on residuals, or a scale of one that is not one number.
    """
    first, alone = said[0], len(said) == 1
    names = " and ".join(repr(one.hint.name) for one in said)
    shared = f"the same for {names}, which are one network and share its residuals"
    for one in said[1:]:
        if one.conditional != first.conditional or (one.mode != first.mode).any():
            raise ParameterError("control_mode", "more than one", shared)
        if (one.weights != first.weights).any():
            raise ParameterError("control_layer_weights", "more than one", shared)
        if not np.array_equal(_where(one.region), _where(first.region)):
            raise ParameterError("control_region", "more than one", shared)
    if not alone and any((one.scale != one.scale[0, 0, 0]).any() for one in said):
        wanted = f"one number for each of {names}, whose features are summed before the first step"
        raise ParameterError("controlnet_conditioning_scale", "a curve or an array", wanted)
    weighed = np.broadcast_to(first.mode * first.weights, first.scale.shape)
    return ControlUse(
        control=control,
        hints=tuple(one.hint if alone else replace(one.hint, scale=float(one.scale[0, 0, 0])) for one in said),
        scale=first.scale * weighed if alone else weighed,
        conditional=first.conditional,
        region=first.region,
    )


def _where(region: NDArray[np.float32] | None) -> NDArray[np.float32]:
    return np.ones((), np.float32) if region is None else region


@dataclass(frozen=True)
class _Picked:
    """What is said of one control: one value for all, a list in order, or a mapping by name."""

    guidance: Guidance
    networks: Mapping[str, str]
    """Everything that the call names, in order, and which control each is of: the name of a ControlNet Union stands for
    all of its pictures."""
    name: str

    def value(self, parameter: str, field: str) -> Any:
        """The value of ``field``, whatever it is."""
        value = getattr(self.guidance, field)
        if isinstance(value, Mapping):
            if self.name not in value and self.networks[self.name] not in value:
                self._check_names(parameter, value)
                raise ParameterError(parameter, dict(value), f"given for control {self.name!r} too")
            return self.by_name(parameter, value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != len(self.networks):
                allowed = f"one value or {len(self.networks)}, one for each control"
                raise ParameterError(parameter, list(value), allowed)
            return value[list(self.networks).index(self.name)]
        return value

    def number(self, parameter: str, field: str) -> float:
        """The value of ``field``, which is one finite number."""
        value = self.value(parameter, field)
        if not is_number(value):
            raise ParameterError(parameter, value, "a finite number")
        return float(value)

    def mode(self) -> ControlMode:
        """The control mode."""
        with about("control_mode"):
            return control_mode(self.value("control_mode", "mode"))

    def by_name(self, parameter: str, value: Any) -> Any:
        """``value`` for all controls, or this one's out of a mapping, which need not have it."""
        if not isinstance(value, Mapping):
            return value
        self._check_names(parameter, value)
        return value.get(self.name, value.get(self.networks[self.name]))

    def _check_names(self, parameter: str, value: Mapping[str, Any]) -> None:
        for key in value:
            if key not in self.networks and key not in self.networks.values():
                with about(parameter):
                    raise UnknownNameError(f"control in {parameter}", str(key), self.networks)
