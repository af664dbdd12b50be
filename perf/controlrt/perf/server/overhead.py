"""What a request takes more than the same call of the pipeline in this process."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from controlrt.perf.server.client import Answer, BlockingClient
from controlrt.perf.server.latencies import median_interval
from controlrt.perf.server.results import CallOverhead, Overhead, OverheadSplit
from controlrt.perf.server.site import Site
from controlrt.perf.server.workload import Workload
from controlrt.runtime.errors import ControlRTError
from controlrt.runtime.pipeline import ControlNetPipeline, Timings
from controlrt.runtime.progress import Progress

STEPS = (4, 20)
ENCODINGS = ("png", "jpeg")
"""Of the answer's picture; a JPEG costs next to nothing, so that the difference is what the PNG takes."""
FIRST = 300_000
"""Number of the first request."""
_STARTS = 10
"""Of a server and a pipeline, which the rounds are spread over: steps take 1 or 2% more in one process than in another,
by the memory that each happens to get."""
_WARM_UPS = 2
"""Rounds after each start that do not count."""


_Kind = tuple[int, str]
"""Steps, and the answer's encoding."""


@dataclass(frozen=True, kw_only=True)
class _Round:
    """A request and a call of the same arguments."""

    request: Answer
    call_seconds: float
    timings: Timings


def measure_overhead(site: Site, *, rounds: int) -> Overhead:
    """Requests and calls by turns, R C C R, one at a time; and the kinds of requests by turns, so that none has a slow
    minute of the machine to itself.

    Args:
        site: where.
        rounds: of each number of steps and encoding.

    Raises:
        ControlRTError: a request was not answered with a picture.
    """
    starts = min(_STARTS, rounds)
    measured: dict[_Kind, list[list[_Round]]] = {
        kind: [[] for _ in range(starts)] for kind in itertools.product(STEPS, ENCODINGS)
    }
    numbers = itertools.count(FIRST)
    with Progress("overhead", starts) as progress:
        for start in range(starts):
            progress.start(f"start {1 + start}")
            with (
                site.serve(f"overhead-{1 + start}", site.policy) as server,
                ControlNetPipeline.load(site.bundle, threads=site.threads) as pipeline,
                BlockingClient(server.url) as client,
            ):
                for turn in range(_WARM_UPS + len(range(start, rounds, starts))):
                    for kind, of_it in measured.items():
                        found = _round(kind, site.workload, next(numbers), client, pipeline, start + turn)
                        if turn >= _WARM_UPS:
                            of_it[start].append(found)
    return Overhead(calls=tuple(_found(kind, of_it) for kind, of_it in measured.items()))


def _round(
    kind: _Kind, workload: Workload, number: int, client: BlockingClient, pipeline: ControlNetPipeline, turn: int
) -> _Round:
    """The request goes first in every other turn."""
    steps, encoding = kind
    asked, request_first = workload.one(number, steps), turn % 2 == 0
    body, arguments = asked.body(response=encoding), asked.arguments()
    answer = client.generate(body) if request_first else None
    started = time.perf_counter()
    drawn = pipeline(**arguments)
    call_seconds = time.perf_counter() - started
    answer = answer or client.generate(body)
    if answer.status != 200:
        raise ControlRTError(f"a request was answered with {answer.status}: {answer.body[:300]!r}")
    return _Round(request=answer, call_seconds=call_seconds, timings=drawn.timings)


def _found(kind: _Kind, starts: Sequence[Sequence[_Round]]) -> CallOverhead:
    steps, encoding = kind
    return CallOverhead(
        steps=steps,
        encoding=encoding,
        request_seconds=tuple(tuple(each.request.seconds for each in rounds) for rounds in starts),
        call_seconds=tuple(tuple(each.call_seconds for each in rounds) for rounds in starts),
        overhead=median_interval([[each.request.seconds - each.call_seconds for each in rounds] for rounds in starts]),
        split=_split(list(itertools.chain.from_iterable(starts))),
    )


def _split(rounds: Sequence[_Round]) -> OverheadSplit:
    """By the server's own account, and the pipeline's."""
    inside = [each.request.fields()["seconds"] for each in rounds]
    calls = [each.timings for each in rounds]
    outside = [each.call_seconds - each.timings.total for each in rounds]

    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    pairs = list(zip(inside, calls, strict=True))
    transport = [
        each.request.seconds - of["total"] - call for each, of, call in zip(rounds, inside, outside, strict=True)
    ]
    return OverheadSplit(
        transport=median(transport),
        before=median([of["queued"] - call.bind - call.condition - call.noise for of, call in pairs]),
        steps=median([of["steps"] - sum(call.steps) for of, call in pairs]),
        decode=median([of["decode"] - call.decode for of, call in pairs]),
    )
