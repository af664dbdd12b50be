"""Who goes next: how the requests of a server are ordered."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Policy = Literal["fifo", "shortest", "deadline", "batch"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
_PATIENCE = 0.1
"""How many seconds of work a request seems shorter for each second that it has waited, so that long ones get through
however many short ones come."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a policy looks at."""

    arrived: float
    """On the clock of ``now``."""
    remaining: float
    """Seconds of work that it still takes, by what steps took so far."""
    deadline: float | None


Order = Callable[[Standing, float], tuple[float, float]]
"""A request's rank at a time, least first."""


def order(policy: Policy) -> Order:
    """The order of ``policy``: first come first served; shortest remaining time first (Schrage & Miller 1966,
    Operations Research 14(4)), with patience; or earliest deadline first (Liu & Layland 1973, JACM 20(1)).

    ``batch`` is first come first served by whole requests, as servers do it that batch calls and not steps: those that
    begin together are drawn to their end before another one begins."""
    return _ORDERS[policy]


def _fifo(standing: Standing, now: float) -> tuple[float, float]:
    del now
    return standing.arrived, 0.0


def _shortest(standing: Standing, now: float) -> tuple[float, float]:
    return standing.remaining - _PATIENCE * (now - standing.arrived), standing.arrived


def _deadline(standing: Standing, now: float) -> tuple[float, float]:
    del now
    return math.inf if standing.deadline is None else standing.deadline, standing.arrived


_ORDERS: dict[Policy, Order] = {"fifo": _fifo, "shortest": _shortest, "deadline": _deadline, "batch": _fifo}
