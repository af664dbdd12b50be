"""What the server is asked for: seeded requests, the same for every server and for the pipeline itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlrt.perf.peers.calls import outlines, prompt

STEPS = (4, 20, 50)
"""Of the mixed load, a third of the requests each: a distilled model's, a fast sampler's, and a pipeline's default."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request for one picture. Its seed decides its prompt, its control picture and its noise."""

    seed: int
    steps: int
    width: int
    height: int
    scheduler: str = "DDIM"
    controls: tuple[str, ...] = ()
    guidance_scale: float = 7.5

    def arguments(self) -> dict[str, Any]:
        """Those of a call of ``ControlNetPipeline``."""
        hints = {name: _hint(self.seed, self.width, self.height) for name in self.controls}
        return {**self._fields(), "image": hints or None}

    def body(self, **fields: Any) -> dict[str, Any]:
        """What is sent to ``POST /v1/generate``, with other fields of that interface."""
        hints = {name: _png(_hint(self.seed, self.width, self.height)) for name in self.controls}
        return {**self._fields(), "image": hints or None, **fields}

    def _fields(self) -> dict[str, Any]:
        return {
            "prompt": prompt(self.seed),
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Where requests come from; each has a seed of its own, so that no cache has its prompt or control picture.

    Args:
        control: on in every request.
        seed: of the order of their steps, and of when they arrive.
    """

    width: int
    height: int
    control: str
    seed: int

    def one(self, number: int, steps: int) -> Asked:
        """The request of a number."""
        return Asked(seed=number, steps=steps, width=self.width, height=self.height, controls=(self.control,))

    def mixed(self, first: int, count: int) -> list[Asked]:
        """``count`` requests, as many of each number of ``STEPS``, shuffled: the work is the same for every seed.

        Args:
            first: number of the first one; blocks that must not share prompts begin far enough apart.
            count: how many.
        """
        steps = [STEPS[number % len(STEPS)] for number in range(count)]
        np.random.default_rng((self.seed, first)).shuffle(steps)
        return [self.one(first + number, each) for number, each in enumerate(steps)]

    def arrivals(self, first: int, count: int, rate: float) -> list[float]:
        """When they arrive: a Poisson process of ``rate`` requests a second, seconds after the start."""
        return poisson_arrivals(count, rate, (self.seed, first, 1))


def poisson_arrivals(count: int, rate: float, seed: Sequence[int]) -> list[float]:
    """Moments of a Poisson process, whose gaps are exponential: ``count`` of them, ``rate`` a second on average."""
    gaps = np.random.default_rng(tuple(seed)).exponential(1 / rate, count)
    return [float(moment) for moment in np.cumsum(gaps)]


def alternating(pairs: int) -> Iterator[tuple[int, bool]]:
    """A B B A A B ...: which pair, and whether it is B's turn, so that a drift of the machine meets both alike."""
    for pair in range(pairs):
        for second in (False, True) if pair % 2 == 0 else (True, False):
            yield pair, second


def _hint(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    return np.rint(255 * outlines((seed, 0), width, height)).astype(np.uint8)


def _png(picture: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
