"""Medians, and ratios of times that were measured in turns, with how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95


class Ratio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many times faster than something else: its seconds over the variant's."""

    value: float
    low: float
    high: float
    """Ends of the 95% confidence interval (percentile bootstrap over rounds)."""


class Measured:
    """The samples of one run: groups that were measured one after the other, each beside the same reference.

    Two variants of one group are compared round by round, which cancels whatever slowed the machine down meanwhile.
    Two of different groups are compared by way of the reference, which ran beside both.

    Args:
        groups: seconds by variant name, one entry per round, the reference in every group.
        reference: its name.
    """

    def __init__(self, groups: Sequence[Mapping[str, Sequence[float]]], reference: str) -> None:
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
        shared = [number for number, group in enumerate(self._groups) if variant in group and over in group]
        if shared:
            rounds = np.concatenate([self._groups[n][over] / self._groups[n][variant] for n in shared])
            return _ratio(np.median(rounds), _resampled(rounds, 0))
        here, there = self._group_of(variant), self._group_of(over)
        to_reference = here[self._reference] / here[variant]
        from_reference = there[over] / there[self._reference]
        return _ratio(
            np.median(to_reference) * np.median(from_reference),
            _resampled(to_reference, 0) * _resampled(from_reference, 1),
        )

    def fastest(self, variants: Sequence[str]) -> str:
        """The fastest of ``variants``, as compared with the reference."""
        return max(variants, key=lambda variant: self.speedup(variant, self._reference).value)

    def _group_of(self, variant: str) -> dict[str, NDArray[np.float64]]:
        for group in self._groups:
            if variant in group:
                return group
        raise KeyError(variant)


def _resampled(rounds: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Medians of resampled rounds."""
    picked = np.random.default_rng(seed).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    medians: NDArray[np.float64] = np.median(rounds[picked], axis=1)
    return medians


def _ratio(value: Any, resampled: NDArray[np.float64]) -> Ratio:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Ratio(value=round(float(value), 4), low=round(float(low), 4), high=round(float(high), 4))
