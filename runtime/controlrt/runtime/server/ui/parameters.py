"""Fields for annotators' parameters, made from what each annotator says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from controlrt.runtime.annotators import Annotator, Given, Parameter

_MOST_TICKS = 4096
"""A slider with more places than this is a field to type in."""


class ParameterFields:
    """One group of fields for each annotator, of which the chosen one's is visible.

    Must be made inside ``gr.Blocks``.
    """

    def __init__(self, annotators: Mapping[str, Annotator], shown: str) -> None:
        self._groups: dict[str, Any] = {}
        self._fields: dict[tuple[str, str], Any] = {}
        for name, annotator in annotators.items():
            with gr.Group(visible=name == shown) as self._groups[name]:
                if not annotator.parameters:
                    gr.Markdown(f"{name} has no parameters.", container=True)
                for parameter in annotator.parameters:
                    self._fields[name, parameter.keyword] = _field(parameter)

    @property
    def fields(self) -> Sequence[Any]:
        """All of them, as inputs of events."""
        return list(self._fields.values())

    def show(self, annotator: str) -> dict[Any, Any]:
        """Updates that make one annotator's fields visible, and no other's."""
        return {group: gr.update(visible=name == annotator) for name, group in self._groups.items()}

    @property
    def groups(self) -> Sequence[Any]:
        """What ``show`` updates."""
        return list(self._groups.values())

    def values(self, annotator: str, given: Mapping[Any, Any]) -> dict[str, Given]:
        """An annotator's parameters among the inputs of an event, by keyword; empty fields are left out."""
        found = {
            keyword: given[field]
            for (name, keyword), field in self._fields.items()
            if name == annotator and given[field] is not None
        }
        return found


def _field(parameter: Parameter) -> Any:
    label = (parameter.alias or parameter.name).replace("_", " ")
    named = {"label": label, "info": parameter.help}
    if parameter.kind == "flag":
        return gr.Checkbox(parameter.default, **named)
    if parameter.kind == "choice":
        return gr.Dropdown(list(parameter.choices), value=parameter.default, **named)
    if parameter.kind in ("text", "size", "numbers"):
        shown = "" if parameter.default == "" else parameter.shown_default
        return gr.Textbox(shown, **named)
    whole = parameter.kind == "integer"
    bounded = math.isfinite(parameter.minimum) and math.isfinite(parameter.maximum)
    if bounded and (not whole or parameter.maximum - parameter.minimum <= _MOST_TICKS):
        span = parameter.maximum - parameter.minimum
        step = 1 if whole else 10.0 ** math.floor(math.log10(span / 50))
        return gr.Slider(parameter.minimum, parameter.maximum, value=parameter.default, step=step, **named)
    return gr.Number(parameter.default, precision=0 if whole else None, **named)
