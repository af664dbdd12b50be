"""Programs that were traced before. Each is kept by all that decides what it is, so that an export traces only what has
changed, and one that was ended goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
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
from controlrt.runtime.storage import atomic_directory, cache_root, lock, sha256_file

_ENTRY = "program.json"
_SOURCES = ("_name_or_path", "name_or_path")
"""Attributes that say where a checkpoint came from."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    program: Program
    files: dict[str, str]
    """SHA-256 by name."""


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
    """Puts a program that was kept into ``directory``; returns its manifest entry, or None where it is not whole."""
    kept = _directory(key)
    try:
        entry = msgspec.json.decode((kept / _ENTRY).read_bytes(), type=_Entry)
        if any(sha256_file(kept / name) != digest for name, digest in entry.files.items()):
            return None
    except (OSError, msgspec.DecodeError):
        return None
    for name in entry.files:
        _link(kept / name, directory / name)
    return entry.program


def keep_traced(key: str, program: Program, directory: Path) -> None:
    """Keeps a program that lies in ``directory``, without taking room of its own where the file system has links."""
    files = [file for file in directory.iterdir() if file.name.startswith(f"{program.name}.onnx")]
    kept = _directory(key)
    with lock(kept), atomic_directory(kept) as partial:
        for file in files:
            _link(file, partial / file.name)
        entry = _Entry(program=program, files={file.name: sha256_file(file) for file in files})
        (partial / _ENTRY).write_bytes(msgspec.json.encode(entry))


def _directory(key: str) -> Path:
    return cache_root() / "traced" / key


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, target)


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
        """Adds a value; objects are their classes and attributes, functions their names."""
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
            case _ if hasattr(value, "__qualname__"):
                self._write(f"{value.__module__}.{value.__qualname__}")
            case _ if id(value) in self._seen:
                self._write(str(self._seen[id(value)]))
            case _ if hasattr(value, "__dict__"):
                self._seen[id(value)] = len(self._seen)
                self._kept.append(value)  # its id stays its own
                self._write(f"{type(value).__module__}.{type(value).__qualname__}")
                self.add(vars(value))
            case _:
                self._write(repr(value))

    def _write(self, text: str) -> None:
        self._hash.update(f"{text}\0".encode())
