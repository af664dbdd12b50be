"""The measurement: workers side by side, one step of each in turn, so that whatever else the machine does hits all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Steps(Protocol):
    """What is measured: a worker."""

    def step(self) -> float:
        """Runs one step; returns its seconds."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A variant and about how much memory its worker takes."""

    name: str
    memory_bytes: int


def grouped(variants: Sequence[Footprint], reference: Footprint, budget: int) -> list[list[str]]:
    """Splits ``variants`` into groups that fit into ``budget`` bytes together with the reference, in order.

    Every group has at least one variant, even one that does not fit: ``excess`` tells.
    """
    groups: list[list[str]] = []
    used = budget + 1
    for variant in variants:
        if used + variant.memory_bytes > budget:
            groups.append([])
            used = reference.memory_bytes
        groups[-1].append(variant.name)
        used += variant.memory_bytes
    return groups


def excess(variants: Sequence[Footprint], reference: Footprint, budget: int) -> int:
    """Bytes by which the reference and the largest variant exceed ``budget``; 0 or less where every pair fits."""
    largest = max((variant.memory_bytes for variant in variants), default=0)
    return reference.memory_bytes + largest - budget


def turns(names: Sequence[str], rounds: range) -> Iterator[tuple[int, str]]:
    """Who is next, with the number of the round: A B C, C B A, A B C, ...

    Going back and forth cancels what grows steadily, heat above all, and what each does to the one after it.
    """
    for number in rounds:
        order = names if (number - rounds.start) % 2 == 0 else reversed(names)
        yield from ((number, name) for name in order)


def interleaved(
    workers: Mapping[str, Steps], repeats: int, each: Callable[[int], None] = lambda _: None
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` steps of each worker, taken in turns after a first round that does not count.

    Args:
        workers: by name; they take turns in this order and back.
        repeats: measured rounds.
        each: called after every round with its number, the warm-up being 0.
    """
    samples: dict[str, list[float]] = {name: [] for name in workers}
    last = 0
    for number, name in turns(tuple(workers), range(repeats + 1)):
        if number > last:
            each(last)
            last = number
        seconds = workers[name].step()
        if number > 0:
            samples[name].append(seconds)
    each(repeats)
    return samples
