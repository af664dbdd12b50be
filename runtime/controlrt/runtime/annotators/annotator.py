"""What an annotator is: a function on pixels, its names, and its parameters as data that are checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB."""
Value = float | int | bool | str | tuple[float, ...]
Given = Value | list[float]

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of an annotator.

    ``name`` is the web UI extension's where it has one (``threshold_a``), and ``alias`` says what it means
    (``low_threshold``); both are understood. The annotator's function has it under the alias.
    """

    name: str
    alias: str = ""
    kind: Literal["integer", "number", "numbers", "size", "choice", "flag", "text"]
    """``numbers`` is one or several, divided by commas; ``size`` is WIDTHxHEIGHT or nothing."""
    default: Value
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    help: str

    @property
    def keyword(self) -> str:
        """What the annotator's function calls it."""
        return self.alias or self.name

    @property
    def label(self) -> str:
        """Both names, as people read them."""
        return f"{self.name} ({self.alias})" if self.alias else self.name

    @property
    def shown_default(self) -> str:
        """The default, as people type it."""
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, tuple):
            return ",".join(f"{number:g}" for number in self.default)
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return str(self.default) or "nothing"

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}"
        if self.kind in ("flag", "text", "size"):
            return {"flag": "true or false", "text": "text", "size": "WIDTHxHEIGHT, such as 512x384"}[self.kind]
        noun = {"integer": "a whole number", "number": "a number", "numbers": "one number, or three R,G,B"}[self.kind]
        if math.isinf(self.maximum):
            return noun if math.isinf(self.minimum) else f"{noun}, {self.minimum:.10g} or more"
        return f"{noun} from {self.minimum:.10g} to {self.maximum:.10g}"

    def check(self, value: Given) -> Value:
        """``value``, or the text it was typed as, in the parameter's own type.

        Raises:
            ParameterError: another type, or out of range.
        """
        checked: Value | None
        if self.kind == "flag":
            checked = _flag(value)
        elif self.kind in ("choice", "text", "size"):
            checked = self._text(value)
        elif self.kind == "numbers":
            checked = self._numbers(value)
        else:
            checked = self._number(value)
        if checked is None:
            raise ParameterError(self.label, value, self.allowed)
        return checked

    def _text(self, value: Given) -> str | None:
        if not isinstance(value, str):
            return None
        if self.kind == "choice":
            return value.lower() if value.lower() in self.choices else None
        if self.kind == "size" and value:
            width, _, height = value.partition("x")
            plain = value.isascii() and width.isdigit() and height.isdigit()
            return value if plain and int(width) > 0 < int(height) else None
        return value

    def _number(self, value: object) -> float | int | None:
        if isinstance(value, bool) or not isinstance(value, (str, int, float, np.number)):
            return None
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        if not (math.isfinite(number) and self.minimum <= number <= self.maximum):
            return None
        if self.kind == "integer":
            return int(number) if number.is_integer() else None
        return number

    def _numbers(self, value: Given) -> tuple[float, ...] | None:
        parts = value.split(",") if isinstance(value, str) else value
        numbers = [self._number(part) for part in (parts if isinstance(parts, (list, tuple)) else [parts])]
        if len(numbers) not in (1, 3):
            return None
        return tuple(float(number) for number in numbers if number is not None) if None not in numbers else None


def _flag(value: Given) -> bool | None:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    return True if text in _TRUE else False if text in _FALSE else None


PROCESSOR_RES = Parameter(
    name="processor_res",
    alias="resolution",
    kind="integer",
    default=0,
    minimum=0,
    maximum=8192,
    help="shorter side at which the annotator works and of what it makes; 0 keeps the picture's size",
)


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """An annotator, declared once: names, a line of help, parameters, and the function."""

    name: str
    summary: str
    function: Callable[..., NDArray[Any]]
    """Called with pixels, after them the mask (height, width) of booleans where there is one, and every parameter."""
    aliases: tuple[str, ...] = ()
    """The web UI extension's names and shorter ones for the same thing."""
    stands_in_for: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    """The extension's names of networks that are not here, with the parameters that come nearest; using one warns."""
    parameters: tuple[Parameter, ...] = ()
    takes: Literal["rgb", "depth"] = "rgb"
    """``depth`` is (height, width), float32 in [0, 1], with all bits that the picture has."""
    needs_mask: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every name it answers to."""
        return (self.name, *self.aliases, *self.stands_in_for)

    @property
    def resizes(self) -> bool:
        """Whether it works at a resolution of its own."""
        return PROCESSOR_RES in self.parameters

    def values(self, given: Mapping[str, Given], name: str = "") -> dict[str, Value]:
        """Every parameter's value by its keyword: those given, the presets of ``name``, and defaults.

        Raises:
            UnknownNameError: a parameter that the annotator does not have.
            ParameterError: a value out of range, or one given under both its names.
        """
        values = {parameter.keyword: parameter.default for parameter in self.parameters}
        values.update(self.stands_in_for.get(name, {}))
        known = {one: parameter for parameter in self.parameters for one in (parameter.alias, parameter.name) if one}
        seen: dict[str, str] = {}
        for key, value in given.items():
            if key not in known:
                raise UnknownNameError(
                    f"parameter of annotator {self.name!r}",
                    key,
                    known,
                    show=[parameter.label for parameter in self.parameters],
                )
            keyword = known[key].keyword
            if keyword in seen:
                raise UserError(f"{seen[keyword]} and {key} are the same parameter of {self.name}; give one")
            seen[keyword] = key
            values[keyword] = known[key].check(value)
        return values
