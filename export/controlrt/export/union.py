"""ControlNet Union (xinsir's ControlNet++): one ControlNet for several types of control pictures, as modules to trace.

diffusers' ControlNetUnionModel is a ControlNet with two additions. The control types of a call are embedded beside the
timestep. And each control picture goes through the hint encoder and a small transformer, whose tokens are the features'
mean and type of each control picture, and the mean of the latents. That transformer's attention takes the batch for
its sequence (PyTorch's ``MultiheadAttention`` does unless told ``batch_first``), so a token attends to itself in the
other rows of the batch and never to another control picture nor to the latents. Rows of one picture have the same
control pictures, so attention over them is what it is over one: the value. What is left depends on control picture
and type alone: all of it can run before the first step, and the step is an ordinary ControlNet's.
"""

from __future__ import annotations

import inspect

from accelerate import init_empty_weights
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor, nn
from torch.nn.functional import linear

from controlrt.export.modules import ControlNetStep


class ControlNetUnionStep(nn.Module):
    """One ControlNet Union: as ControlNetStep, of a control picture that is told its type."""

    def __init__(self, union: ControlNetUnionModel) -> None:
        super().__init__()
        self.features = UnionFeatures(union)
        self.step = ControlNetStep(_behind_its_hint(union))

    def forward(
        self,
        latents: Tensor,
        rows: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        prompt_embeds: Tensor,
        added: dict[str, Tensor],
        hint: Tensor,
        conditioning_scale: Tensor,
        regions: list[Tensor],
        residuals: list[Tensor],
        hint_type: Tensor,
        hint_scale: Tensor,
        control_types: Tensor,
    ) -> list[Tensor]:
        """Residuals so far plus this ControlNet's.

        The features of several control pictures add up, so their sum may stand in a step for those of one.

        Args:
            latents, rows, timestep, input_scale, prompt_embeds, added: as in UNetStep.
            hint, hint_type, hint_scale: as in UnionFeatures.
            conditioning_scale, regions, residuals: as in ControlNetStep.
            control_types: (rows, types), 1 for each type that a control picture of the call has, 0 for the others.
        """
        features = self.features(hint, hint_type, hint_scale)
        return self.step(
            latents,
            rows,
            timestep,
            input_scale,
            prompt_embeds,
            added,
            features,
            conditioning_scale,
            regions,
            residuals,
            class_labels=control_types,
        )


class UnionFeatures(nn.Module):
    """What a ControlNet Union makes of a control picture: it is added to the latents' first features."""

    def __init__(self, union: ControlNetUnionModel) -> None:
        super().__init__()
        self.encoder = union.controlnet_cond_embedding
        self.task_embedding = union.task_embedding
        self.transformer = union.transformer_layes
        self.projection = union.spatial_ch_projs

    def forward(self, hint: Tensor, hint_type: Tensor, hint_scale: Tensor) -> Tensor:
        """(batch, channels, height/8, width/8).

        Args:
            hint: (batch, 3, height, width), in [0, 1].
            hint_type: (batch, types), 1 for the type of the control picture, 0 for the others.
            hint_scale: (batch,); diffusers' scale of a control picture beside others, 1 for one by itself.
        """
        condition = self.encoder(hint)
        token = (condition.mean(dim=(2, 3)) + hint_type @ self.task_embedding) * hint_scale[:, None]
        for layer in self.transformer:
            token = token + _attention_to_itself(layer.attn, layer.ln_1(token))
            token = token + layer.mlp(layer.ln_2(token))
        return (condition + self.projection(token)[:, :, None, None]) * hint_scale[:, None, None, None]


class _ControlTypeEmbedding(nn.Module):
    """The control types of a call as what is added to the timestep's embedding."""

    def __init__(self, union: ControlNetUnionModel) -> None:
        super().__init__()
        self.sinusoids, self.mlp = union.control_type_proj, union.control_add_embedding

    def forward(self, control_types: Tensor) -> Tensor:
        """(rows, types) to (rows, channels)."""
        return self.mlp(self.sinusoids(control_types.flatten()).unflatten(0, control_types.shape).flatten(1))


def _behind_its_hint(union: ControlNetUnionModel) -> ControlNetModel:
    """The ControlNet that a union is once its hint is encoded; its class labels are the control types."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in union.config.items() if name in known}
    with init_empty_weights():
        controlnet = ControlNetModel.from_config({**config, "class_embed_type": "identity"})
    for name, _ in list(controlnet.named_children()):
        if name not in ("controlnet_cond_embedding", "class_embedding"):
            setattr(controlnet, name, getattr(union, name))
    controlnet.controlnet_cond_embedding = nn.Identity()
    controlnet.class_embedding = _ControlTypeEmbedding(union)
    return controlnet.eval()


def _attention_to_itself(attention: nn.MultiheadAttention, token: Tensor) -> Tensor:
    """Attention (Vaswani et al. 2017, arXiv 1706.03762) of a token over copies of it: (batch, channels)."""
    weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    return attention.out_proj(linear(token, weight, bias))
