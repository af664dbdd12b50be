"""Numbers as people read them: 1.97 TFLOP, 860 M, 3.2 GiB."""

from __future__ import annotations

from collections.abc import Sequence

_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def readable_count(count: int) -> str:
    """``859520964`` as ``860 M``: three digits."""
    number, prefix = _scaled(count, 1000, _DECIMAL)
    return f"{number} {prefix}".rstrip()


def readable_flops(flops: int) -> str:
    """``2051000000000`` as ``2.05 TFLOP``: three digits."""
    number, prefix = _scaled(flops, 1000, _DECIMAL)
    return f"{number} {prefix}FLOP"


def readable_bytes(size: int) -> str:
    """``3438081024`` as ``3.2 GiB``: one decimal below 100, in powers of 1024."""
    number, unit = _scaled(size, 1024, _BINARY, decimals=1)
    return f"{number} {unit}"


def _scaled(count: int, base: int, units: Sequence[str], decimals: int = 2) -> tuple[str, str]:
    """``count`` in the largest unit of which there is at least one once rounded, at most ``decimals`` decimals."""
    if count < base:
        return str(count), units[0]
    value = float(count)
    for unit in units[1:-1]:
        value /= base
        number = _three_digits(value, decimals)
        if float(number) < base:
            return number, unit
    return _three_digits(value / base, decimals), units[-1]


def _three_digits(value: float, decimals: int) -> str:
    for places, limit in ((2, 10), (1, 100)):
        number = f"{value:.{min(places, decimals)}f}"
        if float(number) < limit:
            return number
    return f"{value:.0f}"
