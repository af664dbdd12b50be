"""Latencies where requests arrive at random: step by step beside whole requests."""

from __future__ import annotations

import asyncio

from controlrt.perf.server.client import Client
from controlrt.perf.server.latencies import compare_by_steps
from controlrt.perf.server.load import open_loop
from controlrt.perf.server.results import Mixed, MixedBlock, Request
from controlrt.perf.server.site import Site, bodies
from controlrt.perf.server.workload import alternating
from controlrt.runtime.progress import Progress

LOAD = 0.7
FIRST = 100_000
"""Number of the first request."""


def measure_mixed(site: Site, *, capacity: float, requests: int, pairs: int) -> Mixed:
    """Open loops at the policy's server and the baseline's by turns, each pair of blocks with the same arrivals.

    Args:
        site: where.
        capacity: requests per second, of the policy's server.
        requests: of one block.
        pairs: of blocks.
    """
    rate, policies = LOAD * capacity, (site.policy, site.baseline)
    blocks = []
    with (
        site.serve("mixed-policy", site.policy) as ours,
        site.serve("mixed-baseline", site.baseline) as theirs,
        Progress("mixed", 2 * pairs) as progress,
    ):
        for server in (ours, theirs):
            asyncio.run(_warm_up(site, server.url))
        for pair, second in alternating(pairs):
            progress.start(policies[second])
            first = FIRST + pair * requests
            found = asyncio.run(run_open_loop(site, (ours, theirs)[second].url, first, requests, rate))
            blocks.append(MixedBlock(policy=policies[second], pair=pair, requests=tuple(found)))
    return compared(site, rate, blocks)


def compared(site: Site, rate: float, blocks: list[MixedBlock]) -> Mixed:
    """What the blocks come to."""
    ours, theirs = (
        sorted((block for block in blocks if block.policy == policy), key=lambda block: block.pair)
        for policy in (site.policy, site.baseline)
    )
    return Mixed(
        rate=rate,
        load=LOAD,
        blocks=tuple(blocks),
        by_steps=tuple(compare_by_steps(ours, theirs)),
        throughput=_throughput(ours),
        baseline_throughput=_throughput(theirs),
        failed=sum(request.status != 200 for block in blocks for request in block.requests),
    )


async def run_open_loop(site: Site, url: str, first: int, count: int, rate: float, **fields: object) -> list[Request]:
    """The mixed load at one server, from an empty queue to an empty queue.

    Args:
        site: where.
        url: of the server.
        first: number of the first request.
        count: of requests.
        rate: requests per second.
        fields: further ones of every request.
    """
    asked = site.workload.mixed(first, count)
    due = site.workload.arrivals(first, count, rate)
    async with Client(url) as client:
        started, answers = await open_loop(client.generate, bodies(asked, **fields), due)
    return [
        Request(steps=each.steps, due=moment, latency=answer.received - started - moment, status=answer.status)
        for each, moment, answer in zip(asked, due, answers, strict=True)
    ]


async def _warm_up(site: Site, url: str) -> None:
    async with Client(url) as client:
        await site.warm_up(client)


def _throughput(blocks: list[MixedBlock]) -> float:
    return sum(len(block.requests) for block in blocks) / sum(block.seconds for block in blocks)
