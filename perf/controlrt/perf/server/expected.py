"""The requests that a soak sends, and the pictures that the pipeline alone draws for them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controlrt.engines.likeness import psnr as float_psnr
from controlrt.perf.peers.contenders import MIN_PSNR_DB
from controlrt.perf.server.site import Site
from controlrt.perf.server.workload import Asked
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.progress import Progress

FIRST = 600_000
"""Seed of the first request."""
SAMPLERS = ("DDIM", "Euler", "Euler a", "DPM++ 2M Karras", "UniPC", "Heun", "LCM", "DPM++ SDE")
_STEPS = (1, 8)
"""Fewest and most."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Distinct requests, and the picture of each: (height, width, 3)."""

    asked: Sequence[Asked]
    pictures: Sequence[NDArray[np.uint8]]
    min_psnr_db: float
    """That a picture must have against its own."""

    @property
    def closest_psnr_db(self) -> float:
        """Of the two pictures that are most alike."""
        return max((psnr(one, other) for one, other in itertools.combinations(self.pictures, 2)), default=0.0)

    def likeness(self, picture: NDArray[np.uint8], number: int) -> float:
        """How near a picture is to the one of a request: PSNR in dB."""
        return psnr(picture, self.pictures[number])

    def nearest(self, picture: NDArray[np.uint8]) -> int:
        """The request whose picture it is most like."""
        return max(range(len(self.pictures)), key=lambda number: self.likeness(picture, number))


def draw_expected(site: Site, controls: Sequence[str], count: int) -> Expected:
    """Draws ``count`` requests of random samplers, steps, controls and guidance, one at a time.

    One whose picture is too like another's is left out: nobody could tell whether the two were mixed up.
    """
    asked: list[Asked] = []
    pictures: list[NDArray[np.uint8]] = []
    with (
        ControlNetPipeline.load(site.bundle, threads=site.threads) as pipeline,
        Progress("expected pictures", 1) as progress,
    ):
        progress.start(f"{count} requests")
        least = MIN_PSNR_DB[pipeline.bundle.manifest.precision]
        numbers = itertools.count()
        while len(asked) < count:
            request = random_request(site, controls, next(numbers))
            picture = np.asarray(pipeline(**request.arguments()).images[0])
            if all(psnr(picture, other) < least for other in pictures):
                asked.append(request)
                pictures.append(picture)
    return Expected(asked=asked, pictures=pictures, min_psnr_db=least)


def random_request(site: Site, controls: Sequence[str], number: int) -> Asked:
    """A request of the pool."""
    random = np.random.default_rng((site.workload.seed, FIRST, number))
    return Asked(
        seed=FIRST + number,
        steps=int(random.integers(_STEPS[0], _STEPS[1] + 1)),
        width=site.workload.width,
        height=site.workload.height,
        scheduler=SAMPLERS[number % len(SAMPLERS)],
        controls=tuple(name for name in controls if random.random() < 0.7),
        guidance_scale=float(random.choice([1.0, 4.0, 7.5])),
    )


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Of two pictures in 8 bits; no likeness where sizes differ."""
    if one.shape != other.shape:
        return 0.0
    return float_psnr(one.astype(np.float32) / np.float32(255), other.astype(np.float32) / np.float32(255))
