"""Files of textual inversions: vectors that a word was taught to stand for (Gal et al. 2022, arXiv 2208.01618)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.errors import SourceError

PICKLED = (".pt", ".bin", ".ckpt", ".pth")


def read_embedding(file: Path) -> dict[str, NDArray[np.float32]]:
    """The vectors of a ``.safetensors`` file by name, (vectors, width) each.

    One model's are called ``emb_params`` or as the word; SDXL's ``clip_l`` and ``clip_g``.

    Raises:
        SourceError: no such file, a pickled one, or one that holds something else.
    """
    if not file.is_file():
        raise SourceError(f"textual inversion {file} does not exist; give a .safetensors file")
    if file.suffix in PICKLED:
        raise SourceError(
            f"{file} is pickled, and reading it could run what it holds; where PyTorch is installed, save its tensor "
            "with safetensors.torch.save_file({'emb_params': tensor}, FILE) and give that"
        )
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise SourceError(f"{file} is no .safetensors file, or damaged: {error}") from error
    found = {name: np.atleast_2d(tensor).astype(np.float32) for name, tensor in tensors.items()}
    wrong = [name for name, vectors in found.items() if vectors.ndim != 2 or 0 in vectors.shape]
    if wrong or not found or not all(np.isfinite(vectors).all() for vectors in found.values()):
        raise SourceError(f"{file} holds no textual inversion: tensors {', '.join(tensors) or 'none'}")
    return found
