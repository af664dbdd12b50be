"""CLIP prompts to token ids, with the ``tokenizers`` library alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from controlrt.runtime.manifest import TextEncoder


class PromptTruncatedWarning(UserWarning):
    """A prompt was longer than the text encoder reads; the message names what was left out."""


class PromptTokenizer:
    """Turns prompts into the padded token ids that one text encoder takes."""

    def __init__(self, file: Path, encoder: TextEncoder) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._encoder = encoder

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids, start and end token included: (len(prompts), max_length), int64.

        Warns:
            PromptTruncatedWarning: a prompt does not fit; its tail is dropped, as in diffusers.
        """
        encoder = self._encoder
        ids = np.full((len(prompts), encoder.max_length), encoder.pad_token_id, np.int64)
        room = encoder.max_length - 2
        encodings = self._tokenizer.encode_batch(list(prompts), add_special_tokens=False)
        for row, prompt, encoding in zip(ids, prompts, encodings, strict=True):
            kept = [encoder.bos_token_id, *encoding.ids[:room], encoder.eos_token_id]
            row[: len(kept)] = kept
            if len(encoding.ids) > room:
                dropped = prompt[encoding.offsets[room][0] :].strip()
                warnings.warn(
                    f"the prompt has {len(encoding.ids)} tokens, {room} are read; left out: {dropped!r}",
                    PromptTruncatedWarning,
                    stacklevel=4,
                )
        return ids
