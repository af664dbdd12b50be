"""The table a sampler compiles to, and the linear forms it is written in.

Every step of every sampler is linear in what it sees, so a sampler is written once, in linear forms over all steps at
the same time, and compiled to one matrix per step:

    (latents, history) <- update @ (latents, history, model output, noise, clipped)

where ``clipped`` is the predicted picture clamped to a range, for the samplers that clamp it, and the model saw
``input_scale * latents`` at ``timestep``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

HISTORY = 5
"""Tensors that a sampler may keep from step to step; PNDM's Runge-Kutta start keeps this many."""
COLUMNS = 1 + HISTORY + 3
"""What a step combines: latents, history, model output, noise, clipped prediction."""
OUTPUT_COLUMN = 1 + HISTORY
NO_CLIP = float(np.finfo(np.float32).max)

Array = NDArray[np.float64]


class Form:
    """A linear combination of named tensors, with one coefficient per step.

    Coefficients are float64 arrays (steps,) or numbers. Forms add; they are multiplied and divided by arrays.
    """

    __array_ufunc__ = None  # so that array * form asks the form
    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[str, Array | float]) -> None:
        self.terms = terms

    def __add__(self, other: Form) -> Form:
        merged = dict(self.terms)
        for name, value in other.terms.items():
            merged[name] = merged[name] + value if name in merged else value
        return Form(merged)

    def __mul__(self, factor: Array | float) -> Form:
        return Form({name: value * factor for name, value in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Array | float) -> Form:
        return Form({name: value / divisor for name, value in self.terms.items()})

    def __sub__(self, other: Form) -> Form:
        return self + other * -1.0


LATENTS, OUTPUT, NOISE, CLIPPED = (Form({name: 1.0}) for name in ("latents", "output", "noise", "clipped"))


def kept(name: str) -> Form:
    """What the step before put into the history under ``name``; zero before the first step."""
    return Form({f"kept {name}": 1.0})


def where(condition: NDArray[np.bool_], chosen: Form, otherwise: Form) -> Form:
    """``chosen`` at the steps where the condition holds, ``otherwise`` at the others.

    Coefficients that are not chosen may be infinite or not a number: the arithmetic of the last step often is.
    """
    names = {**chosen.terms, **otherwise.terms}
    return Form({n: np.where(condition, chosen.terms.get(n, 0.0), otherwise.terms.get(n, 0.0)) for n in names})


def select(index: NDArray[np.intp], forms: Mapping[int, Form]) -> Form:
    """The form of each step's ``index``."""
    result = Form({})
    for value, form in forms.items():
        result = where(index == value, form, result)
    return result


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a sampler gives: the steps of one run, in forms. ``n`` counts calls of the model."""

    timesteps: Array
    input_scale: Array | float = 1.0
    latents: Form
    """The next latents."""
    start: tuple[Array, Array]
    """Picture to picture starts call i from start[0][i] * picture + start[1][i] * noise."""
    keep: Mapping[str, Form] = field(default_factory=dict)
    """The next history, by name."""
    clip: tuple[Form, float] | None = None
    """The predicted picture, over latents and output, and the range that ``CLIPPED`` holds it in."""
    draws: NDArray[np.bool_] | bool = False
    """At which steps noise is drawn."""
    noise_scale: float = 1.0
    """Text to picture starts from standard normal noise times this."""


@dataclass(frozen=True, kw_only=True)
class SamplerTable:
    """The rows of one sampling run of n model calls, float64."""

    timesteps: Array
    """(n,): what the model is told."""
    input_scale: Array
    """(n,): the model sees latents * input_scale."""
    update: Array
    """(n, 1 + HISTORY, COLUMNS): next latents and history from latents, history, output, noise, clipped."""
    clip: Array
    """(n, 3): clipped = clamp(c[0] * latents + c[1] * output, -c[2], c[2])."""
    draws: NDArray[np.bool_]
    """(n,): whether noise is drawn for the step; the noise column is zero where not."""
    initial: tuple[float, float]
    """The run starts from initial[0] * picture latents + initial[1] * standard normal noise."""
    known: Array
    """(n, 2): after the step, latents stand at known[0] * picture latents + known[1] * noise (inpainting)."""
    history: tuple[str, ...]
    """Names of the history slots in use."""
    predicted: Array
    """(n, 2): each step predicts the picture's latents as p[0] * latents + p[1] * output, for previews."""

    def __len__(self) -> int:
        return len(self.timesteps)


def assemble(steps: Steps, begin: int, picture_to_picture: bool, predicted: Form | None = None) -> SamplerTable:
    """Lays the forms of ``steps`` out as matrices, from row ``begin`` on.

    Args:
        steps, begin, picture_to_picture: what to lay out.
        predicted: the picture's latents, over latents and output; the latents as they stand where None.
    """
    rows = slice(begin, None)
    n = len(steps.timesteps) - begin
    history = tuple(steps.keep)
    if len(history) > HISTORY:
        raise ValueError(
            f"a sampler keeps {len(history)} tensors ({', '.join(history)}); the step has room for {HISTORY}"
        )
    columns = {name: 1 + slot for slot, name in enumerate(f"kept {name}" for name in history)}
    columns |= {"latents": 0, "output": OUTPUT_COLUMN, "noise": COLUMNS - 2, "clipped": COLUMNS - 1}
    update = np.zeros((n, 1 + HISTORY, COLUMNS))
    for row, form in enumerate((steps.latents, *steps.keep.values())):
        for name, value in form.terms.items():
            if np.any(value):  # orders that a run never reaches name tensors that it does not keep
                update[:, row, columns[name]] = np.broadcast_to(value, len(steps.timesteps))[rows]
    clip = np.zeros((n, 3))
    clip[:, 2] = NO_CLIP
    if steps.clip is not None:
        clipped, clip[:, 2] = steps.clip
        clip[:, :2] = _coefficients(clipped, len(steps.timesteps))[rows]
    at = [np.broadcast_to(np.asarray(each, np.float64), len(steps.timesteps)) for each in steps.start]
    known = np.stack([np.append(at[0][begin + 1 :], 1.0), np.append(at[1][begin + 1 :], 0.0)], axis=1)
    initial = (0.0, float(steps.noise_scale))
    if picture_to_picture:
        initial = (float(steps.start[0][begin]), float(steps.start[1][begin]))
    return SamplerTable(
        timesteps=np.asarray(steps.timesteps[rows], np.float64),
        input_scale=np.broadcast_to(np.asarray(steps.input_scale, np.float64), len(steps.timesteps))[rows],
        update=update,
        clip=clip,
        draws=np.broadcast_to(steps.draws, len(steps.timesteps))[rows],
        initial=initial,
        known=known,
        history=history,
        predicted=np.nan_to_num(_coefficients(predicted or LATENTS, len(steps.timesteps))[rows], posinf=0, neginf=0),
    )


def _coefficients(form: Form, n: int) -> Array:
    """(n, 2): of latents and output."""
    return np.stack([np.broadcast_to(form.terms.get(name, 0.0), n) for name in ("latents", "output")], axis=1)
