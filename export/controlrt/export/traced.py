"""Programs that were traced before: each is known by all that decides what it is, so that an export traces only what is
new. Where weights alone are new, the graph is not."""

from __future__ import annotations

import functools
import hashlib
import shutil
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from controlrt.export.other_weights import named_tensors, write_with_weights
from controlrt.export.programs import ProgramSpec
from controlrt.runtime.manifest import Program
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.storage import atomic_file, cache_root, sha256_file

_OVERLOOKED = ("_name_or_path", "name_or_path", "_use_default_values")
"""What configs say of where they came from, and of what files left out, in an order that differs between processes."""


@dataclass(frozen=True, kw_only=True)
class ProgramKeys:
    """What a program is known by."""

    program: str
    """Digest of everything that decides what tracing gives."""
    graph: str
    """The same but for the values of weights."""
    weights: dict[str, str]
    """Digests of these, by name."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    program: Program
    export: str
    """Where it lies."""
    files: dict[str, str]
    """SHA-256 by name within the export."""
    weights: dict[str, str]
    """As ``ProgramKeys`` has them."""

    def whole(self) -> list[Path]:
        """The files, the graph first; none where one is damaged.

        Raises:
            FileNotFoundError: one is gone.
        """
        files = {Path(self.export) / name: digest for name, digest in sorted(self.files.items())}
        return list(files) if all(sha256_file(file) == digest for file, digest in files.items()) else []


def program_keys(spec: ProgramSpec, profile: ShapeProfile, tools: Mapping[str, str]) -> ProgramKeys:
    """Digests of the module as it is in memory, weights, configs and attributes, whichever files it came from.

    Args:
        spec: what is to be traced.
        profile: the sizes that it is traced for; its batch is none of them, since every program takes any.
        tools: what traces it, by name: versions, digests of code.
    """
    tensors = named_tensors(spec.module)
    weights = {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
    by_id = {id(tensor): weights[name] for name, tensor in tensors.items()}
    sizes = (profile.widths, profile.heights, profile.tokens)
    keys = []
    for values in (by_id, dict.fromkeys(by_id, "")):
        digest = _Digest(values)
        for part in (dict(tools), spec.name, spec.inputs, spec.outputs, sizes, spec.module):
            digest.add(part)
        keys.append(digest.hexdigest())
    return ProgramKeys(program=keys[0], graph=keys[1], weights=weights)


def take_traced(keys: ProgramKeys, directory: Path) -> Program | None:
    """Copies a program of an earlier export into ``directory``; returns its manifest entry, or None where it is gone.

    It is a copy, not a link: onnx-ir refuses weights in files that have other names.
    """
    try:
        entry = _read(keys.program)
        files = entry.whole()
        for file in files:
            shutil.copyfile(file, directory / file.name)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return entry.program if files else None


def take_graph(keys: ProgramKeys, spec: ProgramSpec, profile: ShapeProfile, directory: Path) -> Program | None:
    """Writes into ``directory`` a program of an earlier export that differs in weights alone, with those of ``spec``.

    Returns:
        Its manifest entry, or None where there is none that holds.
    """
    try:
        entry = _read(keys.graph)
        files = entry.whole()
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    if not files:
        return None
    return write_with_weights(spec, profile, entry.program, files[0], entry.weights, keys.weights, directory)


def note_traced(keys: ProgramKeys, program: Program, export: Path, digests: Mapping[str, str]) -> None:
    """Notes that a program lies in an export.

    Args:
        keys: the program's.
        program: its manifest entry.
        export: which is there to stay.
        digests: SHA-256 of the export's files, by relative name.
    """
    files = {name: digest for name, digest in digests.items() if name in (program.file, f"{program.file}.data")}
    entry = _Entry(program=program, export=str(export), files=files, weights=keys.weights)
    for key in (keys.program, keys.graph):
        target = _entry(key)
        target.parent.mkdir(exist_ok=True)
        with atomic_file(target) as partial:
            partial.write_bytes(msgspec.json.encode(entry))


def _read(key: str) -> _Entry:
    return msgspec.json.decode(_entry(key).read_bytes(), type=_Entry)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _entry(key: str) -> Path:
    return cache_root() / "traced" / f"{key}.json"


class _Digest:
    """A digest of an object by its content, as deep as it goes.

    Args:
        known: what stands for the values of some tensors, by their ids.
    """

    def __init__(self, known: Mapping[int, str]) -> None:
        self._known = known
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
                if (digest := self._known.get(id(value))) is not None:
                    self._write(digest)
                else:
                    self._hash.update(_bytes(value))
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
                    if key not in _OVERLOOKED:
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
