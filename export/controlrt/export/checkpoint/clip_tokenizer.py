"""CLIP's tokenizer, the same in every Stable Diffusion, from its merges alone: single files come without one."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
MAX_LENGTH = 77


def clip_tokenizer(pad_token: str) -> Any:
    """The tokenizer of CLIP ViT-L/14 and of the OpenCLIP models, 77 tokens long.

    ``pad_token`` is what differs: ``<|endoftext|>`` for CLIP ViT-L/14, ``!`` (id 0) for OpenCLIP's.
    """
    from transformers import CLIPTokenizer

    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    return CLIPTokenizer(
        vocab=_vocabulary(merges),
        merges=[tuple(merge.split(" ")) for merge in merges],
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=pad_token,
        model_max_length=MAX_LENGTH,
    )


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """Ids in the order of Radford et al. 2021: bytes, bytes that end a word, merges, start and end of text."""
    letters = _byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: index for index, token in enumerate([*tokens, START, END])}


def _byte_letters() -> list[str]:
    """A printable letter for each byte: printable bytes first, as themselves, the others from code point 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]
