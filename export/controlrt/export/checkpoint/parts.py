"""A loaded pipeline: its parts, before and after they are made ready to trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Reads = Callable[[str], bool]
"""Whether the weights of a part are read. A part that is not has its shapes and config, and no memory for values."""


def text_encoder_name(index: int) -> str:
    """What the text encoder is called, the first having index 0."""
    return f"text_encoder{f'_{index + 1}' if index else ''}"


@dataclass(frozen=True, kw_only=True)
class LoraSource:
    """A resolved LoRA and the weight it is merged with."""

    name: str
    path: Path
    weight: float


@dataclass(frozen=True, kw_only=True)
class IPAdapterSource:
    """A resolved IP-Adapter: its file, and the folder of the image encoder."""

    name: str
    file: Path
    image_encoder: Path


@dataclass(frozen=True, kw_only=True)
class IPAdapterParts:
    """What of an IP-Adapter depends on the picture alone; the rest is in the UNet's cross-attentions."""

    name: str
    image_encoder: Any
    projection: Any
    """From what the image encoder gives to tokens."""
    penultimate: bool
    """Whether it projects the encoder's hidden states before the last layer; else its image embedding."""
    tokens: int
    """Of one picture."""
    layers: int
    """Cross-attentions that see it."""
    channels: int
    """Of a token."""

    @property
    def program(self) -> str:
        """The name of its program."""
        return f"ip_adapter.{self.name}"

    @property
    def side(self) -> int:
        """Of the square picture that the image encoder sees."""
        return int(self.image_encoder.config.image_size)


@dataclass(frozen=True, kw_only=True)
class PipelineParts:
    """The parts of a pipeline as a loader found them."""

    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    """One, or two for SDXL."""
    tokenizers: tuple[Any, ...]
    """One for each text encoder."""
    scheduler: Any
    zero_empty_negative: bool


@dataclass(frozen=True, kw_only=True)
class TextEncoderParts:
    """One text encoder with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    penultimate: bool
    pooled: bool

    @property
    def max_clip_skip(self) -> int:
        """How many of the last layers can be left out: all of them but, where the last never counts, one."""
        return int(self.model.config.num_hidden_layers) - self.penultimate


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded pipeline, in float32, with its ControlNets and T2I-Adapters by name."""

    unet: Any
    vae: Any
    text_encoders: tuple[TextEncoderParts, ...]
    scheduler_config: dict[str, Any]
    controlnets: dict[str, Any]
    adapters: dict[str, Any]
    ip_adapters: tuple[IPAdapterParts, ...]
    """Its UNet sees them."""
    zero_empty_negative: bool

    @property
    def vae_float32(self) -> bool:
        """Whether the VAE's activations leave the range of float16, by the rule of diffusers' XL pipelines."""
        return self.time_ids and bool(self.vae.config.get("force_upcast", True))

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        levels: int = len(self.vae.config.block_out_channels)
        return 1 << (levels - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def time_ids(self) -> bool:
        """Whether the UNet takes SDXL's size and crop conditioning."""
        return bool(self.unet.config.addition_embed_type == "text_time")
