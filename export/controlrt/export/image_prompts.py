"""IP-Adapters as PyTorch modules to trace: pictures as prompts (Ye et al. 2023, arXiv 2308.06721).

What depends on the picture alone is a program of its own, ``IPAdapterProgram``. Its tokens go to every cross-attention
of the UNet, whose processor is ``ImagePromptAttention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class IPAdapterProgram(nn.Module):
    """CLIP's image encoder and an IP-Adapter's projection of what it gives to tokens.

    Args:
        image_encoder: transformers' CLIPVisionModelWithProjection.
        projection: diffusers' module.
        penultimate: whether the projection reads the hidden states before the last layer, as IP-Adapter Plus does, or
            the image embedding.
    """

    def __init__(self, image_encoder: nn.Module, projection: nn.Module, *, penultimate: bool) -> None:
        super().__init__()
        self.image_encoder, self.projection, self.penultimate = image_encoder, projection, penultimate

    def forward(self, picture: Tensor, seen: Tensor) -> Tensor:
        """Tokens: (batch, tokens, channels).

        Args:
            picture: (batch, 3, side, side), as CLIP sees it; zeros where no picture is seen.
            seen: (batch,); 0 for what guidance leads away from: an embedding of zeros, or hidden states of a picture of
                zeros.
        """
        outputs = self.image_encoder(picture, output_hidden_states=self.penultimate)
        given = outputs.hidden_states[-2] if self.penultimate else outputs.image_embeds * seen[:, None]
        tokens: Tensor = self.projection(given)
        return tokens


class ImagePromptAttention(nn.Module):
    """Decoupled cross-attention: one attention to the words, one to each IP-Adapter's pictures, summed (eq. 5).

    Args:
        layer: which of the UNet's cross-attentions it is.
        to_k, to_v: an IP-Adapter's projections of tokens to keys and values, one for each adapter.
    """

    def __init__(self, layer: int, to_k: Sequence[nn.Linear], to_v: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.layer = layer
        self.to_k, self.to_v = nn.ModuleList(to_k), nn.ModuleList(to_v)

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, tuple[list[Tensor], list[Tensor]]],
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Called by diffusers' ``Attention``.

        Args:
            attn: the ``Attention``.
            hidden_states: (rows, pixels, channels).
            encoder_hidden_states: words (rows, tokens, channels), and for each adapter image prompts (rows, images *
                tokens, channels) and scales (rows, cross-attentions).
            attention_mask, temb: None in Stable Diffusion.
        """
        if attention_mask is not None or temb is not None:
            raise ValueError("image prompts are not made for masked or time-conditioned attention")
        words, (images, scales) = encoder_hidden_states
        query = _heads(attn.to_q(hidden_states), attn.heads)
        found = _attended(query, attn.to_k(words), attn.to_v(words), attn.heads)
        for image, scale, to_k, to_v in zip(images, scales, self.to_k, self.to_v, strict=True):
            found = found + scale[:, self.layer, None, None] * _attended(query, to_k(image), to_v(image), attn.heads)
        for layer in attn.to_out:
            found = layer(found)
        return found


def _heads(projected: Tensor, heads: int) -> Tensor:
    """(rows, tokens, channels) as (rows, heads, tokens, channels / heads)."""
    return projected.view(projected.shape[0], -1, heads, projected.shape[-1] // heads).transpose(1, 2)


def _attended(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """(rows, pixels, channels)."""
    found = F.scaled_dot_product_attention(query, _heads(key, heads), _heads(value, heads))
    return found.transpose(1, 2).reshape(query.shape[0], -1, key.shape[-1])
