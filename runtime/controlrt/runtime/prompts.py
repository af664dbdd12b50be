"""Prompts to the conditioning that the UNet and the ControlNets take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executor import OnnxRuntimeExecutor
from controlrt.runtime.tokenizer import PromptTokenizer

Conditioning = dict[str, NDArray[np.float32]]


class PromptEncoder:
    """Runs every text encoder of a bundle and lays the results out in model rows."""

    def __init__(self, bundle: Bundle, executor: OnnxRuntimeExecutor) -> None:
        self._model = bundle.manifest.model
        self._executor = executor
        self._encoders = [
            (encoder, PromptTokenizer(bundle.file(encoder.tokenizer), encoder))
            for encoder in bundle.manifest.text_encoders
        ]

    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] | None,
        *,
        guided: bool,
        images_per_prompt: int,
        width: int,
        height: int,
    ) -> Conditioning:
        """Conditioning by program input name, one row per model row, unconditional rows first.

        ``prompt_embeds``: (rows, tokens, channels). SDXL adds ``text_embeds``: (rows, channels), the pooled output, and
        ``time_ids``: (rows, 6), original size, crop corner and target size (Podell et al. 2023, arXiv 2307.01952, 2.2).
        """
        halves = [self._run(prompts)]
        if guided:
            if negatives is None and self._model.zero_empty_negative:
                halves.insert(0, {name: np.zeros_like(value) for name, value in halves[0].items()})
            else:
                halves.insert(0, self._run(negatives or [""] * len(prompts)))
        rows = {
            name: np.concatenate([np.repeat(half[name], images_per_prompt, axis=0) for half in halves])
            for name in halves[0]
        }
        if self._model.time_ids:
            size = np.array([height, width, 0, 0, height, width], np.float32)
            rows["time_ids"] = np.tile(size, (len(rows["prompt_embeds"]), 1))
        return rows

    def _run(self, prompts: Sequence[str]) -> Conditioning:
        embeds: list[NDArray[Any]] = []
        conditioning: Conditioning = {}
        for encoder, tokenizer in self._encoders:
            outputs = self._executor.run(encoder.program, {"input_ids": tokenizer(prompts)})
            embeds.append(outputs[0])
            if encoder.pooled:
                conditioning["text_embeds"] = outputs[1]
        return {"prompt_embeds": np.concatenate(embeds, axis=-1), **conditioning}
