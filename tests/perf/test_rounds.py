"""Grouping by memory, and steps taken in turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlrt.perf.rounds import Footprint, excess, grouped, interleaved, turns

REFERENCE = Footprint(name="reference", memory_bytes=5)


def footprints(*sizes: int) -> list[Footprint]:
    return [Footprint(name=f"v{number}", memory_bytes=size) for number, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(1, 60))
def test_groups_hold_everything_once_in_order_and_fit_if_they_can(sizes: list[int], budget: int) -> None:
    variants = footprints(*sizes)
    groups = grouped(variants, REFERENCE, budget)
    assert [name for group in groups for name in group] == [variant.name for variant in variants]
    memory = {variant.name: variant.memory_bytes for variant in variants}
    for group in groups:
        used = REFERENCE.memory_bytes + sum(memory[name] for name in group)
        assert used <= budget or len(group) == 1
    fits = all(REFERENCE.memory_bytes + size <= budget for size in sizes)
    assert fits == (excess(variants, REFERENCE, budget) <= 0) or not sizes


def test_two_large_ones_do_not_share_a_group() -> None:
    assert grouped(footprints(6, 6, 6), REFERENCE, 12) == [["v0"], ["v1"], ["v2"]]
    assert grouped(footprints(6, 6, 6), REFERENCE, 17) == [["v0", "v1"], ["v2"]]
    assert grouped([], REFERENCE, 17) == []


class Fake:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def step(self) -> float:
        self.log.append(self.name)
        return float(len(self.log))


def test_steps_take_turns_and_the_first_round_does_not_count() -> None:
    log: list[str] = []
    rounds: list[int] = []
    samples = interleaved({name: Fake(name, log) for name in "abc"}, 2, rounds.append)
    assert log == list("abccbaabc")
    assert samples == {"a": [6, 7], "b": [5, 8], "c": [4, 9]}
    assert rounds == [0, 1, 2]


def test_rounds_go_back_and_forth() -> None:
    order = list(turns("ab", range(3)))
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert list(turns("ab", range(1, 2))) == [(1, "a"), (1, "b")]
    assert list(turns("", range(4))) == []
