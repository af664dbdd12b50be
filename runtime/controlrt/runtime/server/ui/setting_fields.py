"""Fields for what two pictures of the same prompt and control may differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from controlrt.runtime.errors import UnknownNameError
from controlrt.runtime.samplers import known_names
from controlrt.runtime.server.settings import Settings

STEPS, GUIDANCE, SEED = 20, 7.5, 7
OWN_SAMPLER = "(the model's own)"


class SettingFields:
    """A column of them, whose names on the page begin with ``name``; must be made inside ``gr.Blocks``."""

    def __init__(self, settings: Settings, name: str, *, scale: float = 1.0) -> None:
        self.scale = gr.Slider(0, 2, value=scale, step=0.05, label="control scale", elem_id=f"{name}-scale")
        with gr.Row():
            self.start = gr.Slider(0, 1, value=0, step=0.05, label="from", min_width=100)
            self.end = gr.Slider(0, 1, value=1, step=0.05, label="until", min_width=100)
        self.sampler = gr.Dropdown([OWN_SAMPLER, *known_names()], value=OWN_SAMPLER, label="sampler")
        with gr.Row():
            steps = min(STEPS, settings.max_steps)
            self.steps = gr.Slider(
                1,
                settings.max_steps,
                value=steps,
                step=1,
                label="steps",
                min_width=100,
                elem_id=f"{name}-steps",
            )
            self.guidance = gr.Slider(1, 20, value=GUIDANCE, step=0.5, label="guidance", min_width=100)
        self.seed = gr.Number(SEED, precision=0, label="seed", elem_id=f"{name}-seed")

    @property
    def all(self) -> Sequence[Any]:
        """The fields, as inputs of events."""
        return [self.scale, self.start, self.end, self.sampler, self.steps, self.guidance, self.seed]

    def values(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        """Keyword arguments of ``Choices``.

        Raises:
            UnknownNameError: a sampler that nobody knows.
        """
        sampler = given[self.sampler]
        if sampler != OWN_SAMPLER and sampler not in known_names():
            raise UnknownNameError("sampler", str(sampler), known_names())
        return {
            "scale": given[self.scale],
            "start": given[self.start],
            "end": given[self.end],
            "sampler": None if sampler == OWN_SAMPLER else sampler,
            "steps": given[self.steps],
            "guidance": given[self.guidance],
            "seed": given[self.seed],
        }
