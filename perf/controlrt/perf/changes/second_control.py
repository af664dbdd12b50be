"""What a second ControlNet costs: its own compute, and whatever else there is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controlrt.perf.changes.meter import CallSeconds, Meter
from controlrt.perf.changes.results import SecondControl
from controlrt.perf.changes.walk import Subject
from controlrt.perf.peers.calls import prompt
from controlrt.perf.statistics import Bootstrap
from controlrt.runtime.progress import Progress

KINDS = ("none", "first", "second", "both")


def measure_second_control(
    meter: Meter, subject: Subject, controls: tuple[str, str], programs: tuple[str, str], *, rounds: int, seed: int
) -> SecondControl:
    """Calls without control, with either ControlNet and with both, in an order of its own in every round.

    Args:
        meter: calls the pipeline.
        subject: what all calls have in common.
        controls: names of the two.
        programs: what each runs at a step.
        rounds: measured ones, after one that is not.
        seed: of their orders.
    """
    hints = {name: subject.hint(number) for number, name in enumerate(controls)}
    shown = {"none": (), "first": controls[:1], "second": controls[1:], "both": controls}
    calls: dict[str, list[CallSeconds]] = {kind: [] for kind in KINDS}
    generator = np.random.default_rng((seed, 2))
    with Progress("second ControlNet", rounds + 1) as progress:
        for number in range(-1, rounds):
            progress.start("warm-up" if number < 0 else f"round {number + 1}")
            for place in generator.permutation(len(KINDS)):
                kind = KINDS[place]
                arguments: dict[str, Any] = {
                    **subject.fixed(),
                    "prompt": prompt(0),
                    "seed": 0,
                    "image": {name: hints[name] for name in shown[kind]} or None,
                }
                seconds = meter.call(arguments)
                if number >= 0:
                    calls[kind].append(seconds)
    return summarized(controls, programs, calls)


def summarized(
    controls: tuple[str, str], programs: tuple[str, str], calls: Mapping[str, Sequence[CallSeconds]]
) -> SecondControl:
    """What they took; ratios are of calls of one round, medians over rounds.

    Args:
        controls, programs: as above.
        calls: by kind, one of each round.
    """
    steps = {kind: [statistics.median(call.steps) for call in calls[kind]] for kind in KINDS}
    none, first, second, both = (np.array(steps[kind]) for kind in KINDS)
    own = [
        [call.programs[program] / len(call.steps) for program in programs]
        for call in calls["both"]
        if all(program in call.programs for program in programs)
    ]
    return SecondControl(
        first=controls[0],
        second=controls[1],
        step_seconds={kind: tuple(seconds) for kind, seconds in steps.items()},
        own_seconds=dict(zip(controls, np.median(own, axis=0).tolist(), strict=True)) if own else None,
        ratio=Bootstrap().median((both - none) / (first + second - 2 * none)).ratio(),
        over_own=Bootstrap().median((both - none) / np.sum(own, axis=1)).ratio() if own else None,
    )
