"""How many requests of the mixed load a server manages where somebody always waits."""

from __future__ import annotations

import asyncio

from controlrt.perf.server.client import Client
from controlrt.perf.server.load import closed_loop
from controlrt.perf.server.results import Capacity, CapacityBlock
from controlrt.perf.server.site import Site, bodies, drawn
from controlrt.perf.server.workload import alternating
from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.progress import Progress

CLIENTS = 8
FIRST = 0
"""Number of the first request."""


def measure_capacity(site: Site, *, requests: int, pairs: int) -> Capacity:
    """Closed loops at the policy's server and the baseline's by turns, with the same requests.

    Args:
        site: where.
        requests: of one block.
        pairs: of blocks.

    Raises:
        ControlRTError: a request was not answered with a picture.
    """
    policies = (site.policy, site.baseline)
    blocks = []
    with (
        site.serve("capacity-policy", site.policy) as ours,
        site.serve("capacity-baseline", site.baseline) as theirs,
        Progress("capacity", 2 * pairs) as progress,
    ):
        for server in (ours, theirs):
            asyncio.run(_warm_up(site, server.url))
        for pair, second in alternating(pairs):
            progress.start(policies[second])
            seconds = asyncio.run(_block(site, (ours, theirs)[second].url, FIRST + pair * requests, requests))
            blocks.append(CapacityBlock(policy=policies[second], requests=requests, seconds=seconds))
    rates = {
        policy: sum(b.requests for b in blocks if b.policy == policy)
        / sum(b.seconds for b in blocks if b.policy == policy)
        for policy in policies
    }
    return Capacity(
        clients=CLIENTS,
        blocks=tuple(blocks),
        requests_per_second=rates,
        ratio=rates[site.policy] / rates[site.baseline],
    )


async def _warm_up(site: Site, url: str) -> None:
    async with Client(url) as client:
        await site.warm_up(client)


async def _block(site: Site, url: str, first: int, requests: int) -> float:
    """Seconds from the first request to the last answer."""
    async with Client(url) as client:
        answers = await closed_loop(client.generate, bodies(site.workload.mixed(first, requests)), CLIENTS)
    if drawn(answers) < requests:
        failed = next(answer for answer in answers if answer.status != 200)
        raise ControlRTError(f"a request was answered with {failed.status}: {failed.body[:300]!r}")
    return max(answer.received for answer in answers) - min(answer.sent for answer in answers)
