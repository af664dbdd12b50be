"""Prompts to the embeddings that the earlier stages of UNet and ControlNets take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import ParameterError, SourceError
from controlrt.runtime.executors import Runner
from controlrt.runtime.manifest import TextEncoder
from controlrt.runtime.prompt_syntax import Syntax, parse_prompt
from controlrt.runtime.textual_inversion import read_embedding
from controlrt.runtime.tokenizer import Chunks, PromptTokenizer

XL_NAMES = ("clip_l", "clip_g")
"""What files for SDXL call the vectors of its two text encoders, in their order."""

Array = NDArray[np.float32]
Conditioning = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the prompts of a call are read."""

    syntax: Syntax = "plain"
    clip_skip: int = 0
    """How many of the text encoders' last layers are left out."""
    chunks: int = 1
    """How many chunks every prompt of the call has; shorter ones are filled up with empty prompts."""

    @property
    def of_negatives(self) -> Encoding:
        """How negative prompts are read: as diffusers does, through all layers; as the web UI does, through as many."""
        return self if self.syntax == "webui" else replace(self, clip_skip=0)


Prompt = tuple[str | None, Encoding]
"""A prompt, and how it is read; None is SDXL's empty embedding of zeros."""


@dataclass
class _Encoder:
    """One text encoder, its tokenizer, and the vectors that it learned afterwards."""

    about: TextEncoder
    tokenizer: PromptTokenizer
    width: int
    learned: list[Array]

    @property
    def extra(self) -> Array:
        """(vectors or 1, width)."""
        return np.concatenate(self.learned) if self.learned else np.zeros((1, self.width), np.float32)


class PromptEncoder:
    """Runs every text encoder of a bundle."""

    def __init__(self, bundle: Bundle, executor: Runner) -> None:
        self._executor = executor
        self._limit = bundle.manifest.profile.prompt_chunks
        self._encoders: list[_Encoder] = []
        for about in bundle.manifest.text_encoders:
            shapes = {spec.name: spec.shape for spec in bundle.manifest.program(about.program).inputs}
            tokenizer = PromptTokenizer(bundle.file(about.tokenizer), about)
            self._encoders.append(_Encoder(about, tokenizer, int(shapes["extra_embeddings"][-1]), []))
        self.embeddings: dict[str, Path] = {}
        """Textual inversions by token."""

    def load_textual_inversion(self, file: Path, token: str) -> None:
        """Lets ``token`` stand for what ``file`` learned (Gal et al. 2022, arXiv 2208.01618).

        Raises:
            SourceError: a file that cannot be read or was made for another model.
            ParameterError: a token that the vocabulary has already.
        """
        if token in self.embeddings:
            raise ParameterError("token", token, f"another word: it stands for {self.embeddings[token]} already")
        found = read_embedding(file)
        for_xl = set(XL_NAMES) & set(found)
        if bool(for_xl) != (len(self._encoders) > 1) or (for_xl and for_xl != set(XL_NAMES)):
            wanted = " and ".join(XL_NAMES) if len(self._encoders) > 1 else f"no {' or '.join(XL_NAMES)}"
            raise SourceError(
                f"{file} was made for another model: its tensors are {', '.join(found)}; for this one it has {wanted}"
            )
        chosen = []
        for encoder, name in zip(self._encoders, XL_NAMES, strict=False):
            vectors = found[name] if for_xl else next(iter(found.values()))
            if vectors.shape[1] != encoder.width:
                raise SourceError(
                    f"{file} was made for another model: it has vectors of {vectors.shape[1]} values, "
                    f"{encoder.about.program} takes {encoder.width}"
                )
            chosen.append(vectors)
        counts = [len(vectors) for vectors in chosen]
        if len(set(counts)) > 1:
            raise SourceError(f"{file} has {' and '.join(map(str, counts))} vectors; both encoders take as many")
        for encoder, vectors in zip(self._encoders, chosen, strict=True):
            encoder.tokenizer.learn(token, sum(map(len, encoder.learned)), len(vectors))
            encoder.learned.append(vectors)
        self.embeddings[token] = file

    def encoding(self, prompts: Iterable[str | None], syntax: Syntax, clip_skip: int | None) -> Encoding:
        """How these prompts are read together: all in as many chunks as the longest of them takes.

        Raises:
            PromptError: a prompt that the syntax asked for cannot mean.
            ParameterError: more layers to leave out than there are.
        """
        skipped = 0 if clip_skip is None else clip_skip
        most = min(encoder.about.max_clip_skip for encoder in self._encoders)
        if isinstance(skipped, bool) or not isinstance(skipped, int) or not 0 <= skipped <= most:
            raise ParameterError("clip_skip", clip_skip, f"a whole number from 0 to {most}")
        longest = max(
            len(encoder.tokenizer(parse_prompt(prompt, syntax), self._limit.high, warn=False))
            for prompt in {prompt or "" for prompt in prompts}
            for encoder in self._encoders[:1]  # all have one vocabulary
        )
        return Encoding(syntax=syntax, clip_skip=skipped, chunks=max(longest, self._limit.low))

    def encode(self, prompt: str | None, encoding: Encoding | None = None) -> Conditioning:
        """Conditioning of one prompt by program input name, zeros for None.

        ``prompt_embeds``: (1, tokens, channels), of all encoders side by side. SDXL adds ``text_embeds``:
        (1, channels), the pooled output of the first chunk.
        """
        encoding = encoding or Encoding(chunks=self._limit.low)
        embeds: list[Array] = []
        conditioning: Conditioning = {}
        for encoder in self._encoders:
            chunks = encoder.tokenizer(parse_prompt(prompt or "", encoding.syntax), encoding.chunks)
            parts = [self._chunk(encoder, chunks, index, encoding) for index in range(len(chunks))]
            if len(parts) < encoding.chunks:
                empty = encoder.tokenizer(parse_prompt("", "plain"))
                parts += [self._chunk(encoder, empty, 0, encoding)] * (encoding.chunks - len(parts))
            embeds.append(np.concatenate([part["prompt_embeds"] for part in parts], axis=1))
            if encoder.about.pooled:
                conditioning["text_embeds"] = parts[0]["text_embeds"]
        conditioning["prompt_embeds"] = np.concatenate(embeds, axis=-1)
        return {name: np.zeros_like(value) for name, value in conditioning.items()} if prompt is None else conditioning

    def _chunk(self, encoder: _Encoder, chunks: Chunks, index: int, encoding: Encoding) -> Conditioning:
        """What the encoder makes of one chunk, weighted.

        As in the web UI, embeddings are multiplied by their tokens' weights, and then all of them by one number, so
        that their mean is what it was.
        """
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": chunks.ids[index : index + 1],
            "clip_skip": np.array([encoding.clip_skip], np.int64),
            "extra_embeddings": encoder.extra,
        }
        outputs: Conditioning = dict(self._executor.run(encoder.about.program, inputs))
        weights = chunks.weights[index]
        if (weights != 1).any():
            plain = outputs["prompt_embeds"]
            weighted = plain * weights[:, None]
            outputs["prompt_embeds"] = weighted * (plain.mean() / weighted.mean())
        return outputs
