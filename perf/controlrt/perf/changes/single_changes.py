"""Calls that differ from the one before in one thing, and what that costs the host."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from controlrt.perf.changes.meter import STAGES, CallSeconds, Meter
from controlrt.perf.changes.results import Change
from controlrt.perf.changes.walk import CHANGES, SAME, Turn
from controlrt.perf.statistics import Bootstrap
from controlrt.runtime.progress import Progress


def measure_changes(meter: Meter, turns: Iterator[Turn], rounds: int) -> tuple[Change, ...]:
    """Takes the walk; its warm-up and its ways back are not counted."""
    calls: dict[str, dict[int, list[CallSeconds]]] = {}
    with Progress("changes", rounds + 1) as progress:
        for number, of_round in groupby(turns, key=lambda turn: turn.round):
            progress.start("warm-up" if number < 0 else f"round {number + 1}")
            for turn in of_round:
                seconds = meter.call(turn.arguments)
                if turn.change is not None and number >= 0:
                    calls.setdefault(turn.change, {}).setdefault(number, []).append(seconds)
    return summarized({name: list(by_round.values()) for name, by_round in calls.items()})


def summarized(calls: Mapping[str, Sequence[Sequence[CallSeconds]]]) -> tuple[Change, ...]:
    """What they took.

    Args:
        calls: by change, of each round those that were made.
    """
    same = _host(calls[SAME])
    return tuple(_change(name, calls[name], None if name == SAME else same) for name in (SAME, *CHANGES))


def _change(name: str, rounds: Sequence[Sequence[CallSeconds]], same: Sequence[float] | None) -> Change:
    host, every = _host(rounds), [call for calls in rounds for call in calls]
    added = None
    if same is not None:
        differences = [found - of_same for found, of_same in zip(host, same, strict=True)]
        added = Bootstrap().median(differences).interval()
    return Change(
        name=name,
        host_seconds=tuple(host),
        added=added,
        stages={stage: statistics.median(call.stages[stage] for call in every) for stage in STAGES},
        network_seconds=statistics.median(call.networks for call in every),
        step_seconds=statistics.median(step for call in every for step in call.steps),
    )


def _host(rounds: Sequence[Sequence[CallSeconds]]) -> list[float]:
    """Of each round, the median of its calls."""
    return [statistics.median(call.host for call in calls) for calls in rounds]
