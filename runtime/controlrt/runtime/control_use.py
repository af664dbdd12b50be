"""One control in one call: its pictures, its windows and its scale, as the bytes that the programs read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import ParameterError
from controlrt.runtime.manifest import Control

Mixture = tuple[int, ...]
"""Control pictures that count together, by their place among those of a use."""


@dataclass(frozen=True, kw_only=True)
class ControlHint:
    """One control picture of a call, of each picture that is drawn, and when it counts."""

    name: str
    """What the call says: the control's name, or for a ControlNet Union NAME.TYPE."""
    picture: NDArray[np.float32]
    """(batch, channels, height, width), in [0, 1]; for inpainting -1 where the picture is drawn anew."""
    start: float
    end: float
    control_type: int | None = None
    """Of a ControlNet Union."""
    scale: float = 1.0
    """What a union's features of it are multiplied by: 1 for a picture by itself."""

    def active(self, step: int, steps: int) -> bool:
        """Whether it counts at ``step``: diffusers' window rule, and not at all with scale 0."""
        return self.scale != 0 and in_window(step, steps, self.start, self.end)


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One control in one call."""

    control: Control
    hints: tuple[ControlHint, ...]
    """One, and of a ControlNet Union as many as the call has."""
    scale: NDArray[np.float64]
    """(steps, batch, layers)."""
    conditional: bool
    """Whether it acts on the conditional rows alone."""
    region: NDArray[np.float32] | None
    """Where it acts: (height, width), in [0, 1]; everywhere where None."""

    def active(self, step: int) -> bool:
        """Whether it runs at ``step``: not at all with scale 0, or where none of its pictures counts."""
        return bool(self.scale[step].any() and self.mixture(step))

    def mixture(self, step: int) -> Mixture:
        """The pictures that count at ``step``."""
        return tuple(place for place, hint in enumerate(self.hints) if hint.active(step, len(self.scale)))

    @cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        """Every mixture of a step at which it runs, in the order of the steps."""
        return tuple(dict.fromkeys(self.mixture(step) for step in range(len(self.scale)) if self.active(step)))

    def conditioning_scale(self, guided: bool) -> NDArray[np.float32]:
        """Scale of each step, row and residual: (steps, rows, layers)."""
        if not guided:
            return self.scale.astype(np.float32)
        unconditional = np.zeros_like(self.scale) if self.conditional else self.scale
        return np.concatenate([unconditional, self.scale], axis=1).astype(np.float32)

    def hint_inputs(self, place: int) -> dict[str, NDArray[np.float32]]:
        """What the hint program reads of one picture, by input name: (batch, ...) each."""
        hint = self.hints[place]
        if hint.control_type is None:
            return {"hint": hint.picture}
        batch = len(hint.picture)
        own_type = np.tile(self._types([hint.control_type]), (batch, 1))
        return {"hint": hint.picture, "hint_type": own_type, "hint_scale": np.full(batch, hint.scale, np.float32)}

    @property
    def control_types(self) -> NDArray[np.float32]:
        """The types of all its pictures, as the network is told them at every step: (types,), 1 or 0."""
        return self._types([hint.control_type for hint in self.hints if hint.control_type is not None])

    def _types(self, present: Iterable[int]) -> NDArray[np.float32]:
        types = np.zeros(max(self.control.control_types.values(), default=-1) + 1, np.float32)
        types[list(present)] = 1
        return types


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
