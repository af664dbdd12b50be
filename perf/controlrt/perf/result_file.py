"""Results as JSON files: written whole or not at all, and read with one clear line for what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from controlrt.runtime.errors import UserError
from controlrt.runtime.storage import atomic_file


class Versioned(Protocol):
    """What every result says of itself."""

    @property
    def schema_version(self) -> int:
        """Of its schema."""


Result = TypeVar("Result", bound=Versioned)


def save_result(result: Versioned, file: Path) -> None:
    """Writes a result as indented JSON; its folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")


def load_result(file: Path, kind: type[Result], version: int, command: str) -> Result:
    """Reads what ``save_result`` wrote.

    Args:
        file: the file.
        kind: the schema.
        version: of it.
        command: what makes such files.

    Raises:
        UserError: no such file, or it holds something else.
    """
    try:
        result = msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except msgspec.DecodeError as error:  # ValidationError is one
        raise UserError(f"{file} is no result of {command}: {error}") from None
    if result.schema_version != version:
        raise UserError(f"{file} has schema version {result.schema_version}; this controlrt reads {version}")
    return result


class _Kind(msgspec.Struct):
    benchmark: str


def which_benchmark(file: Path) -> str | None:
    """The benchmark whose result a file is; None for what is no result, which ``load_result`` will say."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Kind).benchmark
    except (OSError, msgspec.DecodeError):
        return None
