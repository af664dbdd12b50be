"""A seeded walk through the arguments of a call: every call differs from the one before in one thing, or in nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.perf.peers.calls import outlines, prompt
from controlrt.runtime.errors import ParameterError

SAME = "nothing"
SCALE, LAYERS, CURVE = "scale", "layer weights", "scale curve"
WINDOW, FIRST_USE = "window", "first use of a window"
GUIDANCE, SEED, PROMPT, PICTURE = "guidance scale", "seed", "prompt", "control picture"
CHANGES = (SCALE, LAYERS, CURVE, WINDOW, FIRST_USE, GUIDANCE, SEED, PROMPT, PICTURE)
"""Of one thing each. A ``window`` is one of two that came before and are at hand; every ``first use`` has its own."""
SAMES = 3
"""Calls without a change in every round: what the others are compared with."""

Window = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What every call of a benchmark has in common."""

    width: int
    height: int
    steps: int
    sampler: str = "DDIM"

    def fixed(self) -> dict[str, Any]:
        """Those arguments. A call ends with latents: no decoder, and no picture of another library's kind."""
        return {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "scheduler": self.sampler,
            "output_type": "latent",
        }

    def hint(self, number: int) -> NDArray[np.uint8]:
        """A control picture of its own for every number: (height, width, 3)."""
        return np.rint(255 * outlines((number, 0), self.width, self.height)).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One call."""

    round: int
    """From 0; the warm-up is -1."""
    change: str | None
    """From the call before: one of CHANGES, SAME, or None for the way back from a window that was used once."""
    arguments: dict[str, Any]


def seen_windows(steps: int) -> tuple[Window, Window]:
    """The two that come again: the whole run and its first half."""
    return (0.0, 1.0), (0.0, max(steps // 2, 1) / steps)


def fresh_windows(steps: int, seed: int) -> list[Window]:
    """All others in which a control acts at some step, shuffled; no two act at the same steps."""
    fractions = [number / steps for number in range(steps + 1)]
    windows = [(start, end) for start in fractions for end in fractions if start < end]
    others = [window for window in windows if window not in seen_windows(steps)]
    return [others[number] for number in np.random.default_rng((seed, 1)).permutation(len(others))]


def check_rounds(steps: int, rounds: int) -> None:
    """Raises ParameterError unless every round has a window of its own, and the warm-up too."""
    windows = len(fresh_windows(steps, 0))
    if not 1 <= rounds < windows:
        raise ParameterError(
            "--rounds", rounds, f"1 to {windows - 1}: {steps} --steps have {windows} windows, one each"
        )


def walk(subject: Subject, control: str, layers: int, *, rounds: int, seed: int) -> Iterator[Turn]:
    """The calls, in order. A warm-up round comes first.

    Args:
        subject: what stays as it is.
        control: the ControlNet that is on.
        layers: how many residuals it has.
        rounds: measured ones. In each every change comes once, in an order of its own, and SAMES calls have none.
        seed: of the orders and the windows.
    """
    generator = np.random.default_rng((seed, 0))
    seen, fresh = seen_windows(subject.steps), fresh_windows(subject.steps, seed)
    window = seen[0]
    arguments = {
        **subject.fixed(),
        **_value(SCALE, 0, subject, control, layers),
        **_value(GUIDANCE, 0, subject, control, layers),
        **_value(SEED, 0, subject, control, layers),
        **_value(PROMPT, 0, subject, control, layers),
        **_value(PICTURE, 0, subject, control, layers),
        **_window(window),
    }
    changes = (*CHANGES, *(SAME,) * SAMES)
    for number in range(-1, rounds):
        if number < 0:  # so that every call of the first round has one before it, and both windows have been used
            yield Turn(round=number, change=None, arguments=dict(arguments))
        for place in generator.permutation(len(changes)):
            change = changes[place]
            if change == FIRST_USE:
                yield Turn(round=number, change=change, arguments={**arguments, **_window(fresh[number + 1])})
                yield Turn(round=number, change=None, arguments=dict(arguments))
                continue
            if change == WINDOW:
                window = seen[window == seen[0]]
                arguments |= _window(window)
            elif change != SAME:
                arguments |= _value(change, number + 2, subject, control, layers)
            yield Turn(round=number, change=change, arguments=dict(arguments))


def _window(window: Window) -> dict[str, Any]:
    return {"control_guidance_start": window[0], "control_guidance_end": window[1]}


def _value(change: str, number: int, subject: Subject, control: str, layers: int) -> dict[str, Any]:
    """The arguments of a change; those of two numbers in a row differ."""
    fraction = (number % 16 + 1) / 32
    if change == SCALE:
        return {"controlnet_conditioning_scale": 0.5 + fraction}
    if change == LAYERS:
        return {"control_layer_weights": [1.0] * (layers - 1) + [fraction]}
    if change == CURVE:
        curve = [1 - fraction * step / subject.steps for step in range(subject.steps)]
        return {"controlnet_conditioning_scale": {control: curve}}
    if change == GUIDANCE:
        return {"guidance_scale": 5 + fraction}
    if change == SEED:
        return {"seed": number}
    if change == PROMPT:
        return {"prompt": prompt(number)}
    return {"image": {control: subject.hint(number)}}
