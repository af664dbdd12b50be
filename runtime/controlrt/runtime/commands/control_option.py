"""The option ``--control``: a control's name, its picture, and how it acts."""

from __future__ import annotations

from collections.abc import Sequence

from controlrt.runtime.errors import UnknownNameError, UserError

DEFAULTS = {"scale": 1.0, "start": 0.0, "end": 1.0}
DRAWING_FORM = "NAME=IMAGE[,scale=1][,start=0][,end=1]"
PLANNING_FORM = "NAME[,scale=1][,start=0][,end=1]"


def parse_control(text: str) -> tuple[str, str, dict[str, float]]:
    """``canny=edges.png,scale=0.8,end=0.5`` as name, path and options. The path may hold commas.

    Raises:
        UserError: no name or path, or an option that is unknown, doubled or not a number.
    """
    name, _, rest = text.partition("=")
    path, *options = rest.split(",")
    while options and "=" not in options[0]:
        path = f"{path},{options.pop(0)}"
    if not (name and path):
        raise UserError(f"--control {text!r} is not {DRAWING_FORM}")
    return name, path, _parse_options(options, text)


def parse_planned_control(text: str) -> tuple[str, dict[str, float]]:
    """``canny,scale=0.8,end=0.5`` as name and options: what a plan needs to know of a control.

    Raises:
        UserError: no name, or an option that is unknown, doubled or not a number.
    """
    name, *options = text.split(",")
    if not name or "=" in name or not all("=" in option for option in options):
        raise UserError(f"--control {text!r} is not {PLANNING_FORM}")
    return name, _parse_options(options, text)


def _parse_options(options: Sequence[str], text: str) -> dict[str, float]:
    """Every option of a control, those in ``options`` as given there."""
    parsed: dict[str, float] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in DEFAULTS:
            raise UnknownNameError("control option", key, DEFAULTS)
        if key in parsed:
            raise UserError(f"--control {text!r} gives {key} twice")
        try:
            parsed[key] = float(value)
        except ValueError:
            raise UserError(f"--control {text!r}: {key} is {value!r}, but must be a number") from None
    return {**DEFAULTS, **parsed}
