"""What ``--lora`` says: a LoRA and the weight to merge it with."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from controlrt.runtime.errors import UserError

LORA_FORM = "SOURCE[:WEIGHT]"
LORA_HELP = "a LoRA or LyCORIS file, folder or hub id to merge into the model, at a weight (1); may be repeated"


@dataclass(frozen=True, kw_only=True)
class LoraOption:
    """A LoRA's source and weight."""

    source: str
    weight: float

    @classmethod
    def parse(cls, text: str) -> LoraOption:
        """``details.safetensors:0.8``, or a source alone for a weight of 1.

        Raises:
            UserError: no source, or a weight that is no finite number.
        """
        source, colon, weight = text.rpartition(":")
        if not colon or "/" in weight or re.fullmatch(r".*\.(safetensors|bin|ckpt|pt|pth)", weight):
            source, weight = text, "1"
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not source or not math.isfinite(number):
            raise UserError(f"--lora {text!r} is not {LORA_FORM}, such as details.safetensors:0.8")
        return cls(source=source, weight=number)

    def __str__(self) -> str:
        return f"{self.source}:{self.weight!r}"
