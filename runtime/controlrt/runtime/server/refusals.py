"""Refusals by name: of fields that are not supported, and of what other parts call by other names."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from controlrt.runtime.errors import RequestError
from controlrt.runtime.server.error_answers import answer_to


def refuse_all(
    given: Mapping[str, Any], off: Mapping[str, tuple[Any, ...]], idle: Collection[str], where: str = ""
) -> None:
    """Refuses every field of ``given`` that would change what is drawn.

    Args:
        given: fields that the interface does not use; null never changes anything.
        off: for each, the values that change nothing.
        idle: fields that mean nothing here, whatever they are.
        where: what they are fields of.

    Raises:
        RequestError: the first that is refused.
    """
    for name, value in given.items():
        field = f"{where}.{name}" if where else name
        if value is None or name in idle:
            continue
        if name not in off:
            raise RequestError(f"{field} is not known here; leave it out", field)
        if not any(type(value) in _kinds(each) and value == each for each in off[name]):
            taken = " or ".join(repr(each) for each in off[name]) or "left out"
            raise RequestError(f"{field} is not supported; it must be {taken}", field)


def _kinds(value: object) -> tuple[type, ...]:
    """Types whose values may stand for ``value``: numbers for each other, but not for booleans."""
    return (int, float) if isinstance(value, (int, float)) and not isinstance(value, bool) else (type(value),)


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """What is refused inside by the pipeline's names is refused by an interface's.

    Args:
        names: those of the interface by those of the pipeline, where they differ.
    """
    try:
        yield
    except (RequestError, ValidationError) as error:
        found = answer_to(error)
        field, dot, rest = (found.parameter or "").partition(".")
        if field not in names:
            raise
        theirs = f"{names[field]}{dot}{rest}"
        raise RequestError(f"{theirs}: {found.message}", theirs) from None
