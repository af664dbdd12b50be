"""What a worker process and the service say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from controlrt.runtime.server.jobs import Pixels

# to the worker


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Draw this."""

    id: str
    arguments: Mapping[str, Any]
    deadline: float | None
    """On the machine's monotonic clock."""
    previews: bool
    alone: bool
    """Whether to draw it in no company: the engine has failed at it once, or at somebody beside it."""
    watched: bool = True
    """Whether anybody hears how far it is before it is finished; words on that have time otherwise."""


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for it any more."""

    id: str


@dataclass(frozen=True)
class Stop:
    """End, now."""


# from the worker, several at once


@dataclass(frozen=True, kw_only=True)
class Ready:
    """It takes requests."""

    silent_seconds: float
    """After so long without a word while it has requests, it is stuck."""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A request that can be drawn, and is queued."""

    id: str
    steps: int
    watched: bool = True
    """See ``Submit``."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A request that cannot be drawn."""

    id: str
    message: str
    parameter: str | None


@dataclass(frozen=True, kw_only=True)
class Advanced:
    """How far a request is; before its first step, it has begun."""

    id: str
    step: int
    previews: tuple[Pixels, ...]
    watched: bool = True
    """See ``Submit``."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A request's pictures."""

    id: str
    pictures: tuple[Pixels, ...]
    seeds: tuple[int, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A request that will not be drawn."""

    id: str
    reason: Literal["deadline", "cancelled", "engine"]
    message: str


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """Steps that were taken since the last word on them, each for several requests at once."""

    steps: tuple[tuple[int, float], ...]
    """Of each, how many pictures it was for, and the seconds that it took."""


@dataclass(frozen=True)
class Broken:
    """The worker is of no use any more, and ends."""

    message: str


Outgoing = Submit | Cancel | Stop
Incoming = Ready | Accepted | Refused | Advanced | Finished | Failed | Stepped | Broken
