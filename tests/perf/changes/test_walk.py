"""The walk: every call differs from the one before in what it says, and in nothing else."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from controlrt.perf.changes.walk import (
    CHANGES,
    CURVE,
    FIRST_USE,
    GUIDANCE,
    LAYERS,
    PICTURE,
    PROMPT,
    SAME,
    SAMES,
    SCALE,
    SEED,
    WINDOW,
    Subject,
    Turn,
    check_rounds,
    fresh_windows,
    seen_windows,
    walk,
)
from controlrt.runtime.control_use import in_window
from controlrt.runtime.errors import ParameterError

STEPS, ROUNDS = 4, 5
SUBJECT = Subject(width=64, height=64, steps=STEPS)
WINDOWS = {"control_guidance_start", "control_guidance_end"}
OF = {
    SAME: set(),
    SCALE: {"controlnet_conditioning_scale"},
    CURVE: {"controlnet_conditioning_scale"},
    LAYERS: {"control_layer_weights"},
    GUIDANCE: {"guidance_scale"},
    SEED: {"seed"},
    PROMPT: {"prompt"},
    PICTURE: {"image"},
}


def taken(seed: int = 0) -> list[Turn]:
    return list(walk(SUBJECT, "canny", 9, rounds=ROUNDS, seed=seed))


def acts(arguments: dict[str, Any]) -> tuple[bool, ...]:
    start, end = arguments["control_guidance_start"], arguments["control_guidance_end"]
    return tuple(in_window(step, STEPS, start, end) for step in range(STEPS))


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    names = {*one, *other}
    return {name for name in names if not np.array_equal(repr(one.get(name)), repr(other.get(name)))} | {
        "image" for a, b in [(one["image"], other["image"])] if not np.array_equal(a["canny"], b["canny"])
    }


def test_calls_differ_in_what_they_say_alone() -> None:
    turns = taken()
    for before, after in pairwise(turns):
        found = differing(before.arguments, after.arguments)
        if after.change in OF:
            assert found == OF[after.change], after.change
        else:
            assert found
            assert found <= WINDOWS


def test_every_round_has_every_change_once_in_an_order_of_its_own() -> None:
    turns = taken()
    for number in range(-1, ROUNDS):
        found = Counter(turn.change for turn in turns if turn.round == number and turn.change)
        assert found == {**dict.fromkeys(CHANGES, 1), SAME: SAMES}
    orders = {tuple(turn.change for turn in turns if turn.round == number) for number in range(ROUNDS)}
    assert len(orders) == ROUNDS
    assert [turn.change for turn in taken()] == [turn.change for turn in turns]
    assert [turn.change for turn in taken(seed=1)] != [turn.change for turn in turns]


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_new_at_their_first_use_and_at_hand_otherwise(seed: int) -> None:
    """A pipeline keeps four plans, the least recently used go first."""
    kept: list[tuple[bool, ...]] = []
    for turn in taken(seed):
        steps = acts(turn.arguments)
        if turn.change == FIRST_USE:
            assert steps not in kept
            assert any(steps)
        elif turn.round >= 0:
            assert steps in kept, turn.change
        if turn.change == WINDOW:
            assert turn.arguments["control_guidance_end"] in {end for _, end in seen_windows(STEPS)}
        kept = [*(each for each in kept if each != steps), steps][-4:]
    used = [acts(turn.arguments) for turn in taken(seed) if turn.change == FIRST_USE]
    assert len(set(used)) == len(used)


def test_there_is_a_window_for_every_round() -> None:
    assert len(fresh_windows(7, 0)) == 7 * 8 // 2 - 2
    check_rounds(7, 25)
    with pytest.raises(ParameterError, match=r"1 to 25: 7 --steps have 26 windows"):
        check_rounds(7, 26)
    with pytest.raises(ParameterError, match="--rounds"):
        check_rounds(1, 1)
