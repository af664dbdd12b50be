"""Reading a file of tensors: safetensors, or a pickle of which nothing but tensors is believed."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlrt.runtime.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """What a file of weights holds."""

    path: Path
    tensors: dict[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The header's own words, of safetensors only."""
    global_step: int | None = None
    """Training steps, where a training script's pickle says so."""

    def having(self, prefix: str) -> dict[str, Any]:
        """The tensors whose names start with ``prefix``, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def read_tensor_file(path: Path) -> TensorFile:
    """Reads all tensors of ``path`` onto the CPU, in the types they are stored in.

    Raises:
        SourceError: a damaged file, one without tensors, or a pickle with anything in it that is not plain data.
    """
    try:
        found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except SourceError:
        raise
    except Exception as error:  # every format has exceptions of its own
        says = "" if isinstance(error, KeyError) else str(error).strip()  # a pickle's are opcodes
        reason = says.splitlines()[0] if says else type(error).__name__
        mend = "give a .safetensors, .ckpt or .pth file, or a diffusers folder"
        raise SourceError(f"{path} is damaged or no file of tensors ({reason}); {mend}") from error
    if not found.tensors:
        raise SourceError(f"{path} holds no tensors")
    return found


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        names = list(file.keys())
        return TensorFile(
            path=path, tensors={name: file.get_tensor(name) for name in names}, metadata=file.metadata() or {}
        )


def _read_pickle(path: Path) -> TensorFile:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise SourceError(
            f"{path} is damaged, or holds Python objects{what} beside its tensors, and running a file's code is not "
            "safe; take the .safetensors file of the same model, or convert it where it is trusted"
        ) from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} holds a {type(content).__name__}, not tensors by name")
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, dict):
        raise SourceError(f"{path} holds a {type(tensors).__name__} as state_dict, not tensors by name")
    if not any(isinstance(value, torch.Tensor) for value in tensors.values()):  # grouped, as in an IP-Adapter's
        groups = {name: group for name, group in tensors.items() if isinstance(group, dict)}
        tensors = {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}
    step = content.get("global_step")
    return TensorFile(
        path=path,
        tensors={name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)},
        global_step=step if isinstance(step, int) else None,
    )


def metadata_json(file: TensorFile, key: str) -> dict[str, Any]:
    """A JSON object of the header; empty where it has none.

    Raises:
        SourceError: text that is no JSON object.
    """
    text = file.metadata.get(key)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SourceError(f"{file.path} is damaged: {key} in its header is no JSON object")
    return value
