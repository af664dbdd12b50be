"""Ratios of times that were measured in turns: how many times faster one is than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from controlrt.perf.statistics import Bootstrap, Estimate, Ratio


class Measured:
    """The samples of one run: groups that were measured one after the other, each beside the same reference.

    Two variants of one group are compared round by round, which cancels whatever slowed the machine down meanwhile.
    Two of different groups are compared by way of the reference, which ran beside both.

    Args:
        groups: seconds by variant name, one entry per round, the reference in every group.
        reference: its name.
    """

    def __init__(self, groups: Sequence[Mapping[str, Sequence[float] | NDArray[np.float64]]], reference: str) -> None:
        for group in groups:
            if reference not in group:
                raise ValueError(f"a group without the reference {reference}: {', '.join(group)}")
        self._groups = [{name: np.asarray(seconds) for name, seconds in group.items()} for group in groups]
        self._reference = reference

    def speedup(self, variant: str, over: str) -> Ratio:
        """Seconds of ``over`` divided by those of ``variant``: the median over rounds.

        Raises:
            KeyError: a variant that was not measured.
        """
        return self.estimate(variant, over, Bootstrap()).ratio()

    def estimate(self, variant: str, over: str, bootstrap: Bootstrap) -> Estimate:
        """The same with its resamplings, to go on calculating with.

        Raises:
            KeyError: a variant that was not measured.
        """
        shared = [number for number, group in enumerate(self._groups) if variant in group and over in group]
        if shared:
            return bootstrap.median(np.concatenate([self._groups[n][over] / self._groups[n][variant] for n in shared]))
        here, there = self._group_of(variant), self._group_of(over)
        to_reference = bootstrap.median(here[self._reference] / here[variant])
        return to_reference * bootstrap.median(there[over] / there[self._reference])

    def fastest(self, variants: Sequence[str]) -> str:
        """The fastest of ``variants``, as compared with the reference."""
        return max(variants, key=lambda variant: self.speedup(variant, self._reference).value)

    def _group_of(self, variant: str) -> dict[str, NDArray[np.float64]]:
        for group in self._groups:
            if variant in group:
                return group
        raise KeyError(variant)
