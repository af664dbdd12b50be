"""The layout of a plan's memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlrt.runtime.cuda.memory import ALIGNMENT, Lifetime, aligned, lower_bound, place

blocks = st.lists(
    st.tuples(st.integers(1, 2**20), st.integers(0, 30), st.integers(0, 10)).map(
        lambda each: Lifetime(each[0], each[1], each[1] + each[2])
    ),
    max_size=40,
).map(lambda found: {f"block {index}": block for index, block in enumerate(found)})


@given(blocks)
def test_blocks_in_use_together_lie_apart(found: dict[str, Lifetime]) -> None:
    placement = place(found)
    for one, first in found.items():
        assert placement.offsets[one] % ALIGNMENT == 0
        assert placement.offsets[one] + first.size <= placement.total
        for other, second in found.items():
            together = one != other and first.first <= second.last and second.first <= first.last
            if together:
                starts = placement.offsets[one], placement.offsets[other]
                assert starts[0] + first.size <= starts[1] or starts[1] + second.size <= starts[0]


@given(blocks)
def test_no_layout_beats_the_lower_bound(found: dict[str, Lifetime]) -> None:
    assert lower_bound(found) <= place(found).total <= sum(aligned(block.size) for block in found.values())


@given(blocks)
def test_a_layout_is_close_to_the_lower_bound(found: dict[str, Lifetime]) -> None:
    assert place(found).total <= 1.1 * lower_bound(found)


@pytest.mark.parametrize("seed", range(40))
def test_so_are_layouts_that_the_largest_first_does_badly_at(seed: int) -> None:
    """Sizes of all magnitudes; with these, that alone takes up to 1.14 of the bound."""
    rng = np.random.default_rng(seed)
    firsts, lengths = rng.integers(0, 31, 40), rng.integers(0, 11, 40)
    sizes = 2 ** rng.uniform(0, 20, 40) if seed % 2 else rng.integers(1, 2**20, 40)
    found = {
        str(number): Lifetime(int(size), int(first), int(first + length))
        for number, (size, first, length) in enumerate(zip(sizes, firsts, lengths, strict=True))
    }
    assert place(found).total <= 1.1 * lower_bound(found)


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=20), st.integers(2, 8))
def test_a_chain_takes_what_two_links_take(sizes: list[int], length: int) -> None:
    """Sets of buffers that take turns, as residuals of a chain of ControlNets: never more than two are alive."""
    found = {
        f"{turn}.{index}": Lifetime(size, turn, turn + 1) for turn in range(length) for index, size in enumerate(sizes)
    }
    assert place(found).total <= 1.1 * lower_bound(found)


def test_a_block_goes_into_the_smallest_gap() -> None:
    found = {
        "left": Lifetime(4096, 0, 9),
        "wide": Lifetime(3072, 0, 1),
        "middle": Lifetime(2048, 0, 9),
        "narrow": Lifetime(1024, 0, 1),
        "right": Lifetime(512, 0, 9),
        "late": Lifetime(256, 5, 6),
    }
    placement = place(found)
    assert placement.total == lower_bound(found)
    assert placement.offsets["late"] == placement.offsets["narrow"]
