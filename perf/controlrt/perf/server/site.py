"""What all parts of the benchmark share: the bundle, the requests, and how servers are started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlrt.perf.server.client import Answer, Client
from controlrt.perf.server.load import closed_loop
from controlrt.perf.server.serving import COMMAND, Served
from controlrt.perf.server.workload import STEPS, Asked, Workload

WARM_UP = 10_000_000
"""Number of the first request that warms a server up."""
_WARM_UPS = 2
_QUEUE = 1000
"""Requests that a server takes at once where none is to be refused."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where the parts are measured.

    Args:
        bundle: what servers and the pipeline draw with.
        workload: what is asked for.
        policy: of the server that is measured.
        baseline: of the one beside it.
        threads: of each worker, and of the pipeline.
        batch: pictures that take a step together, at most; the server's default where None.
        scratch: directory for logs.
        command: what starts a server, before the bundle.
    """

    bundle: Path
    workload: Workload
    policy: str
    baseline: str
    threads: int
    batch: int | None
    scratch: Path
    command: Sequence[str] = COMMAND

    def serve(self, name: str, policy: str, queue: int = _QUEUE) -> Served:
        """A server, to be entered."""
        options = ["--policy", policy, "--queue", str(queue), "--threads", str(self.threads)]
        if self.batch is not None:
            options += ["--batch", str(self.batch)]
        return Served(self.bundle, self.scratch / f"{name}.log", options, command=self.command)

    async def warm_up(self, client: Client) -> None:
        """Requests that nobody measures, by which whatever is done late is done."""
        asked = [self.workload.one(WARM_UP + number, min(STEPS)) for number in range(_WARM_UPS)]
        await closed_loop(client.generate, bodies(asked), clients=1)


def bodies(asked: Sequence[Asked], **fields: object) -> list[dict[str, object]]:
    """What is sent for each; made beforehand, so that encoding pictures takes nothing from the server's cores."""
    return [each.body(**fields) for each in asked]


def drawn(answers: Sequence[Answer]) -> int:
    """How many have a picture."""
    return sum(answer.status == 200 for answer in answers)
