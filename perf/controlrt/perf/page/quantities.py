"""Times as people read them: 1.90 s, 12.3 ms."""

from __future__ import annotations

_UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))


def time_unit(largest: float) -> tuple[float, str]:
    """The factor and the name of the unit in which the largest of some seconds is at least 1."""
    return next(((factor, unit) for factor, unit in _UNITS if largest * factor >= 1), _UNITS[-1])


def readable_seconds(seconds: float) -> str:
    """``0.01234`` as ``12.3 ms``: three digits, all of those before the point."""
    factor, unit = time_unit(seconds * 1.0005)
    value = seconds * factor
    places = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{places}f} {unit}" if seconds else "0 s"
