"""What numbers should be, and whether they are."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from controlrt.perf.text_table import aligned


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a number should be. It follows from the rest of a result and is not in its file."""

    name: str
    found: float
    bound: float
    at_most: bool
    """Otherwise at least."""

    @property
    def is_met(self) -> bool:
        """Whether it is."""
        return self.found <= self.bound if self.at_most else self.found >= self.bound


def verdicts(targets: Sequence[Target]) -> str:
    """Every target, and whether it is met."""
    rows = [["target", "found", "asked", ""]]
    for target in targets:
        asked = f"{'at most' if target.at_most else 'at least'} {target.bound:g}"
        rows.append([target.name, f"{target.found:.4g}", asked, "met" if target.is_met else "MISSED"])
    return "\n".join(aligned(rows, left=(0, 2, 3)))


def missed(targets: Sequence[Target]) -> str:
    """The names of those that are not met, in one line; empty where all are."""
    return "; ".join(target.name for target in targets if not target.is_met)
