"""Prompts to the embeddings that the earlier stages of UNet and ControlNets take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors import Executor
from controlrt.runtime.tokenizer import PromptTokenizer

Conditioning = dict[str, NDArray[np.float32]]


class PromptEncoder:
    """Runs every text encoder of a bundle."""

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        self._executor = executor
        self._encoders = [
            (encoder, PromptTokenizer(bundle.file(encoder.tokenizer), encoder))
            for encoder in bundle.manifest.text_encoders
        ]

    def encode(self, prompt: str | None) -> Conditioning:
        """Conditioning of one prompt by program input name, zeros for None.

        ``prompt_embeds``: (1, tokens, channels), of all encoders side by side. SDXL adds ``text_embeds``:
        (1, channels), the pooled output.
        """
        embeds: list[NDArray[Any]] = []
        conditioning: Conditioning = {}
        for encoder, tokenizer in self._encoders:
            outputs = self._executor.run(encoder.program, {"input_ids": tokenizer([prompt or ""])})
            embeds.append(outputs["prompt_embeds"])
            if encoder.pooled:
                conditioning["text_embeds"] = outputs["text_embeds"]
        conditioning["prompt_embeds"] = np.concatenate(embeds, axis=-1)
        return {name: np.zeros_like(value) for name, value in conditioning.items()} if prompt is None else conditioning
