"""What every contender does with a call, and how long each stage took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from controlrt.perf.peers.calls import Call

T = TypeVar("T")


class CallSeconds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one call; ``controlrt.perf.results.StageSamples`` says what each stage is."""

    text: float
    hint: float
    timestep_table: float
    steps: tuple[float, ...]
    host_steps: tuple[float, ...]
    host: float
    decode: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a call gave."""

    pictures: NDArray[np.float32]
    """(batch, height, width, 3) in [0, 1]."""
    latents: list[NDArray[np.float32]]
    """After each step, where they were asked for and the contender gives them away."""
    seconds: CallSeconds


class Drawer(Protocol):
    """One loaded contender."""

    def draw(self, call: Call, record: bool) -> Drawn:
        """Draws the pictures of a call.

        Args:
            call: what to draw.
            record: whether the latents of every step are wanted.
        """


@dataclass
class Stopwatch:
    """Seconds by stage, added up."""

    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, stage: str, function: Callable[..., T]) -> Callable[..., T]:
        """``function``, with its seconds counted for ``stage``."""

        def run(*args: Any, **kwargs: Any) -> T:
            started = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] = self.of(stage) + perf_counter() - started

        return run

    def of(self, stage: str) -> float:
        """Seconds so far."""
        return self.seconds.get(stage, 0.0)
