"""How the libraries' loaders are called: without chatter, and with one kind of error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from controlrt.runtime.errors import SourceError

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


def loading_options(folder: Path) -> dict[str, Any]:
    """Loading options: no network, and the fp16 files where a folder has no others."""
    options: dict[str, Any] = {"local_files_only": True}
    names = [file.name for file in folder.glob("*") if file.suffix in WEIGHTS_SUFFIXES]
    if names and all(".fp16." in name for name in names):
        options["variant"] = "fp16"
    return options


def prepared(module: Any) -> Any:
    """The module in float32, for reading only."""
    return module.float().eval().requires_grad_(False)


def refuse_incomplete(what: str, info: Mapping[str, Any]) -> None:
    """Raises SourceError where a loader found no tensor for a parameter."""
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise SourceError(f"{what} lacks {len(info['missing_keys'])} tensors, such as {first}")


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """Keeps the loaders quiet and turns whatever they raise into a SourceError that names the checkpoint."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # every loader has exceptions of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"cannot load {path}: {reason}") from error
