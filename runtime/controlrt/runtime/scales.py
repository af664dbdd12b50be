"""How strongly a control acts: a number, a curve over the steps, weights of layers, the dialects of guess mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError, UnknownNameError
from controlrt.runtime.manifest import Control

Scale = float | Callable[[float], float] | Sequence[float] | NDArray[Any]
"""A number; a function of the fraction of the steps that are done; one number per step; or an array that broadcasts to
(steps, pictures, layers)."""
LayerWeights = Literal["soft"] | Sequence[float]
ControlMode = Literal["balanced", "prompt", "controlnet"]
GuessMode = bool | Literal["diffusers", "original"]

MODES: dict[Any, ControlMode] = {
    **{name: name for name in ("balanced", "prompt", "controlnet")},
    **{"my prompt is more important": "prompt", "controlnet is more important": "controlnet"},
    **{0: "balanced", 1: "prompt", 2: "controlnet"},
}
"""Control modes by the names and numbers that the web UI's extension knows them by."""
ADAPTER_SOFT = (0.25, 0.62, 0.825, 1.0)
"""The extension's soft weights of a T2I-Adapter's features."""


def over_steps(parameter: str, value: Scale, steps: int, batch: int, layers: int) -> NDArray[np.float64]:
    """``value`` at every step, picture and layer: (steps, batch, layers).

    Raises:
        ParameterError: of another kind or length, or not finite.
    """
    shape = (steps, batch, layers)
    if callable(value):
        value = [value(step / steps) for step in range(steps)]
    if isinstance(value, (str, bytes, bool)):
        raise ParameterError(parameter, value, "a finite number")
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ParameterError(parameter, value, "a finite number, one per step, or a function of the step") from None
    if not is_float32(array):
        raise ParameterError(parameter, value, "a finite number of float32")
    listed = array.ndim == 1 and not isinstance(value, np.ndarray)  # of an array nobody knows which axis is meant
    if listed and len(array) == steps:
        array = array[:, None, None]
    elif listed:
        raise ParameterError(parameter, value, f"a number or {steps} of them, one for each call of the model")
    if array.ndim not in (0, 3) or any(own not in (1, wanted) for own, wanted in zip(array.shape, shape, strict=False)):
        found = f"an array of shape {array.shape}"
        raise ParameterError(parameter, found, f"a number, a list, or an array of (steps, pictures, layers) = {shape}")
    return np.broadcast_to(array, shape)


def layer_weights(control: Control, weights: LayerWeights | None) -> NDArray[np.float64]:
    """The weight of each of a control's layers: (layers,); ones where not given.

    Raises:
        ParameterError: another number of them, or one that is not finite.
    """
    if weights is None:
        return np.ones(control.layers)
    if isinstance(weights, str) and weights == "soft":
        return soft_weights(control)
    allowed = f"'soft' or {control.layers} finite numbers for control {control.name!r}"
    try:
        array = np.asarray(weights, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ParameterError("control_layer_weights", weights, allowed) from None
    if array.shape != (control.layers,) or not is_float32(array):
        raise ParameterError("control_layer_weights", weights, allowed)
    return array


def soft_weights(control: Control) -> NDArray[np.float64]:
    """0.825 to the power of 12 - i for residual i, as in the original ControlNet's guess mode and the extension.

    Of 13 residuals the middle block's has the weight 1. A model with fewer has the first of the 13 weights, as the
    extension gives them.
    """
    if control.kind == "adapter":
        if control.layers != len(ADAPTER_SOFT):
            wanted = f"given for adapters of {len(ADAPTER_SOFT)} features, not {control.layers}"
            raise ParameterError("control_layer_weights", "soft", wanted)
        return np.array(ADAPTER_SOFT)
    return 0.825 ** np.arange(12, 12 - control.layers, -1, dtype=np.float64)


def control_mode(value: Any) -> ControlMode:
    """The control mode that ``value`` names.

    Raises:
        UnknownNameError: none does.
    """
    key = value.strip().lower() if isinstance(value, str) else value
    key = int(key) if isinstance(key, str) and key.isdecimal() else key
    if isinstance(key, bool) or not isinstance(key, (str, int)) or key not in MODES:
        raise UnknownNameError("control mode", str(value), list(map(str, MODES)))
    return MODES[key]


def check_guess_mode(value: Any) -> str | None:
    """The dialect of guess mode that ``value`` asks for, "diffusers" where it is True; None without guess mode.

    Raises:
        ParameterError: another value.
    """
    if value is None or value is False:
        return None
    if value is True:
        return "diffusers"
    if value not in ("diffusers", "original"):
        raise ParameterError("guess_mode", value, "True, False, 'diffusers' or 'original'")
    return str(value)


def mode_weights(control: Control, guess: str | None, mode: ControlMode) -> tuple[NDArray[np.float64], bool]:
    """The layers' weights that a mode brings, and whether control acts on the conditional rows alone.

    Args:
        control: whose.
        guess: diffusers' guess mode has weights from 0.1 to 1 on a log scale; the original's are the soft ones.
        mode: "prompt" has soft weights; "controlnet" too, on the conditional rows alone.
    """
    if control.kind == "adapter":
        if mode == "controlnet":
            raise ParameterError("control_mode", mode, f"balanced or prompt for adapter {control.name!r}")
        return (soft_weights(control) if mode == "prompt" else np.ones(control.layers)), False
    if guess is not None and mode != "balanced":
        raise ParameterError("control_mode", mode, "balanced in guess mode, which weighs layers by itself")
    conditional = guess is not None or mode == "controlnet" or control.global_pool
    if guess == "diffusers" and not control.global_pool:
        return np.logspace(-1, 0, control.layers), conditional
    if guess == "original" or mode != "balanced":
        return soft_weights(control), conditional
    return np.ones(control.layers), conditional


def is_float32(value: float | np.number[Any] | NDArray[np.float64]) -> bool:
    """Whether all of ``value`` is finite in float32 too."""
    try:
        array = np.asarray(value, np.float64)
    except OverflowError:  # a whole number
        return False
    return bool((np.abs(array) <= np.finfo(np.float32).max).all())


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is one number, finite in float32."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and is_float32(value)
