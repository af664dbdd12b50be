"""CLIP prompts to chunks of token ids, with the ``tokenizers`` library alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from controlrt.runtime.errors import ParameterError, SourceError
from controlrt.runtime.manifest import TextEncoder
from controlrt.runtime.prompt_syntax import Segment

BACKTRACK = 20
"""So many tokens after a comma may go with it to the next chunk, as in the web UI."""


class PromptTruncatedWarning(UserWarning):
    """A prompt was longer than the bundle reads; the message names what was left out."""


@dataclass(frozen=True)
class Chunks:
    """A prompt as a text encoder takes it, chunk by chunk."""

    ids: NDArray[np.int64]
    """(chunks, max_length), start and end token included."""
    weights: NDArray[np.float32]
    """(chunks, max_length), 1 where nothing else was said."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class _Chunk:
    """The tokens of a chunk that is being filled."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    comma: int = -1
    """How many tokens there were before the last comma."""

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def cut(self, start: int) -> _Chunk:
        """Takes what lies from ``start`` on into a new chunk."""
        new = _Chunk(self.ids[start:], self.weights[start:])
        del self.ids[start:], self.weights[start:]
        return new


class PromptTokenizer:
    """Turns prompts into the padded token ids that one text encoder takes."""

    def __init__(self, file: Path, encoder: TextEncoder) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._encoder = encoder
        self._comma = self._tokenizer.token_to_id(",</w>")
        self._room = encoder.max_length - 2
        self._vectors: dict[int, list[int]] = {}

    def learn(self, token: str, first: int, count: int) -> None:
        """Makes ``token`` stand for ``count`` learned vectors, the rows from ``first`` on of the encoder's extra ones.

        Raises:
            ParameterError: the vocabulary has the token already, or it is no token at all.
            SourceError: more vectors than a chunk has room for.
        """
        if count > self._room:
            raise SourceError(
                f"{token} has {count} learned vectors; a text encoder reads {self._room} tokens at a time"
            )
        if not token.strip() or self._tokenizer.token_to_id(token) is not None:
            raise ParameterError("token", token, "a word that the vocabulary does not have, such as <my-style>")
        self._tokenizer.add_tokens([token])
        start = self._encoder.vocab_size + first
        (known,) = self._tokenizer.encode(token, add_special_tokens=False).ids
        self._vectors[known] = list(range(start, start + count))

    def __call__(self, segments: Sequence[Segment], limit: int = 1, *, warn: bool = True) -> Chunks:
        """The chunks of a prompt, at least one and at most ``limit``.

        A chunk that is full is cut after its last comma, and the rest goes to the next one, if the comma is near and
        the next one has room for the rest and what comes.

        Warns:
            PromptTruncatedWarning: the prompt does not fit; its tail is dropped, as in diffusers.
        """
        chunks = [_Chunk()]
        total, full, left_out = 0, False, ""
        for segment in segments:
            if full:
                left_out += f" {segment.text}" if segment.starts_chunk else segment.text
            elif segment.starts_chunk and len(chunks) == limit:
                full, left_out = True, segment.text
            elif segment.starts_chunk:
                chunks.append(_Chunk())
            encoding = self._tokenizer.encode(segment.text, add_special_tokens=False)
            for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
                ids = self._vectors.get(token, [token])
                total += len(ids)
                chunk = chunks[-1]
                if not full and len(chunk.ids) + len(ids) > self._room:
                    if len(chunks) == limit:
                        full, left_out = True, segment.text[start:]
                    else:
                        rest = len(chunk.ids) - chunk.comma - 1
                        near = token != self._comma and chunk.comma >= 0 and rest < BACKTRACK
                        near = near and rest + len(ids) <= self._room
                        chunks.append(chunk.cut(chunk.comma + 1 if near else len(chunk.ids)))
                        chunk = chunks[-1]
                if not full:
                    if token == self._comma:
                        chunk.comma = len(chunk.ids)
                    chunk.add(ids, segment.weight)
        left_out = left_out.strip()
        if left_out and warn:
            read = sum(len(chunk.ids) for chunk in chunks)
            warnings.warn(
                f"the prompt has {total} tokens, {read} are read; left out: {left_out!r}; "
                "build-engines --prompt-chunks makes room for longer ones",
                PromptTruncatedWarning,
                stacklevel=4,
            )
        return self._framed(chunks)

    def _framed(self, chunks: Sequence[_Chunk]) -> Chunks:
        """With start and end token, padded."""
        encoder = self._encoder
        shape = (len(chunks), encoder.max_length)
        ids, weights = np.full(shape, encoder.pad_token_id, np.int64), np.ones(shape, np.float32)
        for row, own, chunk in zip(ids, weights, chunks, strict=True):
            row[: len(chunk.ids) + 2] = [encoder.bos_token_id, *chunk.ids, encoder.eos_token_id]
            own[1 : len(chunk.ids) + 1] = chunk.weights
        return Chunks(ids, weights)
