"""Thousands of requests of every kind, good and bad: none may be lost, none mixed up, and memory must not grow."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from controlrt.perf.server.client import Client
from controlrt.perf.server.expected import Expected
from controlrt.perf.server.results import Resident, Soak
from controlrt.perf.server.serving import Served
from controlrt.perf.server.shutdown import held
from controlrt.perf.server.site import Site
from controlrt.perf.server.visits import KINDS, Outcome, visit
from controlrt.runtime.progress import Progress

CLIENTS = 16
_SAMPLE_SECONDS = 1.0
_SETTLE_SECONDS = 60.0
_REPORTS = 20
"""Of progress."""


def measure_soak(site: Site, expected: Expected, *, requests: int) -> Soak:
    """So many requests by ``CLIENTS`` clients, each of which sends its next one when it is through with the one before.

    Args:
        site: where.
        expected: the requests that there are, with their pictures.
        requests: how many are sent.
    """
    with site.serve("soak", site.policy) as server:
        return asyncio.run(_run(site, server, expected, requests))


async def _run(site: Site, server: Served, expected: Expected, requests: int) -> Soak:
    outcomes: list[Outcome] = []
    resident: list[Resident] = []
    started = time.monotonic()
    async with Client(server.url) as client:
        await site.warm_up(client)
        sampling = asyncio.ensure_future(_sample(server, started, outcomes, resident))
        with Progress("soak", _REPORTS) as progress:
            await _visit_all(site, client, expected, requests, outcomes, progress)
        seconds = time.monotonic() - started
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        left_over = await _left_over(client)
    return summarized(outcomes, resident, seconds=seconds, left_over=left_over, between=expected.closest_psnr_db)


def summarized(
    outcomes: Sequence[Outcome], resident: Sequence[Resident], *, seconds: float, left_over: int, between: float
) -> Soak:
    """What the outcomes come to."""
    by_kind: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        by_kind.setdefault(outcome.kind, Counter())[outcome.ended] += 1
    compared = [outcome.psnr_db for outcome in outcomes if outcome.psnr_db is not None]
    return Soak(
        requests=len(outcomes),
        clients=CLIENTS,
        seconds=seconds,
        outcomes={kind: dict(by_kind[kind].most_common()) for kind in sorted(by_kind)},
        lost=tuple(outcome.lost for outcome in outcomes if outcome.lost),
        mixed_up=tuple(outcome.mixed_up for outcome in outcomes if outcome.mixed_up),
        compared=len(compared),
        lowest_psnr_db=min(compared, default=None),
        between_psnr_db=between,
        resident=tuple(resident),
        growth=growth([each.resident_bytes for each in resident]),
        left_over=left_over,
    )


def growth(sizes: Sequence[int]) -> float | None:
    """Of samples over time, over their second half: the median of its last tenth over that of its first, less one; None
    of none, or of zeros."""
    half = sizes[len(sizes) // 2 :]
    tenth = max(1, len(half) // 10)
    if not half or not statistics.median(half[:tenth]):
        return None
    return statistics.median(half[-tenth:]) / statistics.median(half[:tenth]) - 1


async def _visit_all(
    site: Site, client: Client, expected: Expected, requests: int, outcomes: list[Outcome], progress: Progress
) -> None:
    numbers = itertools.count()
    names, weights = list(KINDS), np.array(list(KINDS.values()), np.float64)

    async def visitor() -> None:
        while (number := next(numbers)) < requests:
            random = np.random.default_rng((site.workload.seed, number))
            kind = names[random.choice(len(names), p=weights / weights.sum())]
            outcomes.append(await visit(client, kind, expected, random))
            if len(outcomes) * _REPORTS // requests > (len(outcomes) - 1) * _REPORTS // requests:
                progress.start(f"{len(outcomes)} of {requests} answered")

    await asyncio.gather(*(visitor() for _ in range(CLIENTS)))


async def _sample(server: Served, started: float, outcomes: list[Outcome], resident: list[Resident]) -> None:
    while True:
        size = await asyncio.to_thread(server.resident_bytes)
        resident.append(Resident(seconds=time.monotonic() - started, answered=len(outcomes), resident_bytes=size))
        await asyncio.sleep(_SAMPLE_SECONDS)


async def _left_over(client: Client) -> int:
    """What the server still has when everybody is gone and it had time to notice."""
    until = time.monotonic() + _SETTLE_SECONDS
    while (left := await held(client)) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    return left
