"""Programs that were traced before: each is known by all that decides what it is, so that an export traces only what is
new."""

from __future__ import annotations

import functools
import hashlib
import shutil
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from controlrt.export.programs import ProgramSpec
from controlrt.runtime.manifest import Program
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.storage import atomic_file, cache_root, sha256_file

_SOURCES = ("_name_or_path", "name_or_path")
"""Attributes that say where a checkpoint came from."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    program: Program
    export: str
    """Where it lies."""
    files: dict[str, str]
    """SHA-256 by name within the export."""


def program_key(spec: ProgramSpec, profile: ShapeProfile, tools: Mapping[str, str]) -> str:
    """Digest of everything that decides what tracing gives.

    It covers the module as it is in memory, weights, configs and attributes, whichever files it came from.

    Args:
        spec: what is to be traced.
        profile: the sizes that it is traced for.
        tools: what traces it, by name: versions, digests of code.
    """
    digest = _Digest()
    for part in (dict(tools), spec.name, spec.inputs, spec.outputs, profile, spec.module):
        digest.add(part)
    return digest.hexdigest()


def take_traced(key: str, directory: Path) -> Program | None:
    """Copies a program of an earlier export into ``directory``; returns its manifest entry, or None where it is gone.

    It is a copy, not a link: onnx-ir refuses weights in files that have other names.
    """
    try:
        entry = msgspec.json.decode(_entry(key).read_bytes(), type=_Entry)
        files = {Path(entry.export) / name: digest for name, digest in entry.files.items()}
        if any(sha256_file(file) != digest for file, digest in files.items()):
            return None
        for file in files:
            shutil.copyfile(file, directory / file.name)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return entry.program


def note_traced(key: str, program: Program, export: Path, digests: Mapping[str, str]) -> None:
    """Notes that a program lies in an export.

    Args:
        key: the program's.
        program: its manifest entry.
        export: which is there to stay.
        digests: SHA-256 of the export's files, by relative name.
    """
    files = {name: digest for name, digest in digests.items() if name in (program.file, f"{program.file}.data")}
    target = _entry(key)
    target.parent.mkdir(exist_ok=True)
    with atomic_file(target) as partial:
        partial.write_bytes(msgspec.json.encode(_Entry(program=program, export=str(export), files=files)))


def _entry(key: str) -> Path:
    return cache_root() / "traced" / f"{key}.json"


class _Digest:
    """A digest of an object by its content, as deep as it goes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Adds a value; objects are their classes and attributes, functions their names and what they hold."""
        self._write(type(value).__qualname__)
        match value:
            case None | bool() | int() | float() | str() | bytes() | torch.dtype() | torch.device():
                self._write(repr(value))
            case Tensor():
                self._write(f"{value.dtype} {tuple(value.shape)}")
                self._hash.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            case np.ndarray():
                self._write(f"{value.dtype} {value.shape}")
                self._hash.update(value.tobytes())
            case functools.partial():
                self.add([value.func, value.args, value.keywords])
            case msgspec.Struct():
                self.add(msgspec.to_builtins(value))
            case Mapping():
                self._write(str(len(value)))
                for key, each in value.items():
                    if key not in _SOURCES:
                        self.add(key)
                        self.add(each)
            case Sequence():
                self._write(str(len(value)))
                for each in value:
                    self.add(each)
            case set() | frozenset():
                self._write(repr(sorted(map(repr, value))))
            case type():
                self._write(f"{value.__module__}.{value.__qualname__}")
            case types.MethodType():
                self.add([value.__func__, value.__self__])
            case _ if id(value) in self._seen:
                self._write(str(self._seen[id(value)]))
            case types.FunctionType():
                self._remember(value)
                self._write(f"{value.__module__}.{value.__qualname__}")
                self.add([value.__defaults__, *map(_contents, value.__closure__ or ())])
            case _ if hasattr(value, "__qualname__"):
                self._write(f"{value.__module__}.{value.__qualname__}")
            case _ if hasattr(value, "__dict__"):
                self._remember(value)
                self._write(f"{type(value).__module__}.{type(value).__qualname__}")
                self.add(vars(value))
            case _:
                self._write(repr(value))

    def _remember(self, value: object) -> None:
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)  # its id stays its own

    def _write(self, text: str) -> None:
        self._hash.update(f"{text}\0".encode())


def _contents(cell: types.CellType) -> object:
    """What a function holds on to; nothing before it is set."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
