"""The option ``--control``: a control's name, its picture, and how it acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from controlrt.runtime.errors import UnknownNameError, UserError

DEFAULTS = {"scale": 1.0, "start": 0.0, "end": 1.0}
DRAWING_DEFAULTS: dict[str, Any] = {**DEFAULTS, "mode": "balanced", "weights": None, "region": None}
DRAWING_FORM = "NAME=IMAGE[,scale=1][,start=0][,end=1][,mode=MODE][,weights=soft|W/W/...][,region=IMAGE]"
PLANNING_FORM = "NAME[,scale=1][,start=0][,end=1]"


def parse_control(text: str) -> tuple[str, str, dict[str, Any]]:
    """``canny=edges.png,scale=0.8,end=0.5`` as name, path and options. The path may hold commas.

    The mode is balanced, prompt or controlnet, weights are one number for each residual or ``soft``, and the region is
    the path of a picture.

    Raises:
        UserError: no name or path, or an option that is unknown, doubled or not of its kind.
    """
    name, _, rest = text.partition("=")
    path, *options = rest.split(",")
    while options and "=" not in options[0]:
        path = f"{path},{options.pop(0)}"
    if not (name and path):
        raise UserError(f"--control {text!r} is not {DRAWING_FORM}")
    return name, path, _parse_options(options, text, DRAWING_DEFAULTS)


def parse_planned_control(text: str) -> tuple[str, dict[str, float]]:
    """``canny,scale=0.8,end=0.5`` as name and options: what a plan needs to know of a control.

    Raises:
        UserError: no name, or an option that is unknown, doubled or not a number.
    """
    name, *options = text.split(",")
    if not name or "=" in name or not all("=" in option for option in options):
        raise UserError(f"--control {text!r} is not {PLANNING_FORM}")
    return name, _parse_options(options, text, DEFAULTS)


def _parse_options(options: Sequence[str], text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a control, those in ``options`` as given there."""
    parsed: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in defaults:
            raise UnknownNameError("control option", key, defaults)
        if key in parsed:
            raise UserError(f"--control {text!r} gives {key} twice")
        if not value:
            raise UserError(f"--control {text!r} gives {key} no value")
        if key in DEFAULTS:
            parsed[key] = _number(text, key, value)
        elif key == "weights" and value != "soft":
            parsed[key] = [_number(text, key, weight) for weight in value.split("/")]
        else:
            parsed[key] = value
    return {**defaults, **parsed}


def _number(text: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"--control {text!r}: {key} is {value!r}, but must be a number") from None
