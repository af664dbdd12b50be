"""Where buffers lie: blocks that are never in use together share memory."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Of every block, in bytes: what cudaMalloc promises and engines expect."""
_NEAR = 1.05
"""How much more than the lower bound a layout may take without a further try."""
_ATTEMPTS = 300


@dataclass(frozen=True)
class Lifetime:
    """A block's size in bytes, and the first and last moment it is in use."""

    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Placement:
    """The offset of each block, and the bytes of all of them."""

    offsets: dict[str, int]
    total: int


def place(blocks: Mapping[str, Lifetime]) -> Placement:
    """Lays out blocks so that no two overlap in both memory and time.

    The largest first, each into the smallest gap that holds it: Greedy by Size, Pisarchyk & Lee 2020, arXiv 2001.03288,
    algorithm 3. Where that leaves much unused, the block that sticks out farthest gets its place sooner, and all are
    laid out again, some times; the best layout is taken. The same blocks are always laid out the same way.
    """
    order = sorted(blocks, key=lambda each: (-blocks[each].size, blocks[each].first, each))
    enough, chance = _NEAR * lower_bound(blocks), random.Random(0)
    best = placement = _place_in(order, blocks)
    for _ in range(_ATTEMPTS):
        if best.total <= enough:
            break
        index = max(range(len(order)), key=lambda each: placement.offsets[order[each]] + blocks[order[each]].size)
        order.insert(chance.randrange(max(1, index)), order.pop(index))
        placement = _place_in(order, blocks)
        best = min(best, placement, key=lambda each: each.total)
    return best


def _place_in(order: Sequence[str], blocks: Mapping[str, Lifetime]) -> Placement:
    """Blocks in this order, each in the smallest gap that holds it."""
    offsets: dict[str, int] = {}
    total = 0
    for name in order:
        block, size = blocks[name], aligned(blocks[name].size)
        beside = sorted(
            (offsets[other], offsets[other] + aligned(blocks[other].size))
            for other in offsets
            if _together(block, blocks[other])
        )
        offsets[name] = _gap(beside, size)
        total = max(total, offsets[name] + size)
    return Placement(offsets, total)


def lower_bound(blocks: Mapping[str, Lifetime]) -> int:
    """What is in use at the fullest moment: no layout takes less."""
    moments = {block.first for block in blocks.values()}
    return max(
        (sum(aligned(b.size) for b in blocks.values() if b.first <= moment <= b.last) for moment in moments), default=0
    )


def aligned(size: int) -> int:
    """``size`` rounded up to whole alignments."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _together(one: Lifetime, other: Lifetime) -> bool:
    return one.first <= other.last and other.first <= one.last


def _gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The start of the smallest gap between ``taken``, sorted intervals that may overlap, which holds ``size``."""
    best, best_size, end = None, None, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best_size is None or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return end if best is None else best
