"""IP-Adapters (Ye et al. 2023, arXiv 2308.06721): the plain one, Plus and Full Face, as diffusers reads them.

A file holds ``image_proj.*``, from what the image encoder gives to tokens, and ``ip_adapter.N.to_k_ip.weight`` and
``to_v_ip``, of each cross-attention of the UNet in diffusers' order, N being 1, 3, 5, ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn

from controlrt.export.checkpoint.architectures import empty_model
from controlrt.export.checkpoint.parts import IPAdapterParts, IPAdapterSource, Reads
from controlrt.export.checkpoint.quiet_loading import loading, loading_options, prepared, refuse_incomplete
from controlrt.export.checkpoint.tensor_file import read_tensor_file
from controlrt.export.image_prompts import ImagePromptAttention
from controlrt.runtime.errors import SourceError

PLAIN_TOKENS = 4
ENCODER = "CLIPVisionModelWithProjection"


def attach_ip_adapters(
    unet: Any, sources: Sequence[IPAdapterSource], reads: Reads = lambda _: True
) -> tuple[IPAdapterParts, ...]:
    """Lets the UNet's cross-attentions see the adapters' image prompts, and gives the rest of each, in float32.

    Image encoders of adapters that ``reads`` leaves out have no values.

    Raises:
        SourceError: damaged or missing weights, an adapter of faces, or one for another model or image encoder.
    """
    if not sources:
        return ()
    names = [name.removesuffix(".processor") for name in unet.attn_processors if not name.endswith("attn1.processor")]
    attentions = [unet.get_submodule(name) for name in names]
    encoders: dict[tuple[Path, bool], Any] = {}
    parts, projections = [], []
    for source in sources:
        what = f"IP-Adapter {source.name} ({source.file})"
        file = read_tensor_file(source.file)
        image_proj, weights = file.having("image_proj."), file.having("ip_adapter.")
        _refuse_another_kind(what, image_proj, weights)
        projections.append(_projections(what, weights, attentions))
        encoder = source.image_encoder, reads(f"ip_adapter.{source.name}")
        if encoder not in encoders:
            encoders[encoder] = _load_image_encoder(*encoder)
        parts.append(_parts(what, source, image_proj, unet, encoders[encoder], len(attentions)))
    for layer, attention in enumerate(attentions):
        keys_and_values = [adapter[layer] for adapter in projections]
        attention.set_processor(ImagePromptAttention(layer, *zip(*keys_and_values, strict=True)))
    unet.encoder_hid_proj = nn.Identity()  # image prompts are tokens already
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    prepared(unet)
    return tuple(parts)


def _refuse_another_kind(what: str, image_proj: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raises SourceError for what is no IP-Adapter, or one that needs more than a picture and CLIP."""
    if not image_proj or not weights:
        raise SourceError(f"{what} is no IP-Adapter: it has no tensors named image_proj.* and ip_adapter.*")
    of_a_face = "norm.weight" in image_proj and not {"proj.weight", "proj.3.weight"} & image_proj.keys()
    of_a_face = of_a_face or "perceiver_resampler.proj_in.weight" in image_proj
    if of_a_face or any(".to_k_lora." in name for name in weights):
        raise SourceError(
            f"{what} is an IP-Adapter FaceID, which needs a network that recognises faces; supported: IP-Adapter, "
            "IP-Adapter Plus and IP-Adapter Full Face"
        )


def _projections(
    what: str, weights: Mapping[str, Tensor], attentions: Sequence[Any]
) -> list[tuple[nn.Linear, nn.Linear]]:
    """The projections to keys and values, for each of the UNet's cross-attentions."""
    expected = {
        f"{2 * layer + 1}.to_{kind}_ip.weight": tuple(getattr(attention, f"to_{kind}").weight.shape)
        for layer, attention in enumerate(attentions)
        for kind in "kv"
    }
    if weights.keys() != expected.keys():
        raise SourceError(
            f"{what} was made for another model: it is for {len(weights) // 2} cross-attentions, the UNet has "
            f"{len(attentions)}"
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise SourceError(
                f"{what} was made for another model: its {name} is {tuple(weights[name].shape)}, for the UNet it must "
                f"be {shape}"
            )
    device = attentions[0].to_k.weight.device  # PyTorch's meta device where the UNet has no values
    linear = {name: _linear(weights[name].to(device)) for name in expected}
    return [
        (linear[f"{number}.to_k_ip.weight"], linear[f"{number}.to_v_ip.weight"])
        for number in range(1, 2 * len(attentions), 2)
    ]


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    return layer


def _load_image_encoder(folder: Path, values: bool) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with loading(folder):
        config = json.loads((folder / "config.json").read_text())
        found = (config.get("architectures") or [config.get("_class_name")])[0]
        if found != ENCODER:
            raise SourceError(f"the image encoder {folder} is a {found}; supported: {ENCODER}")
        if not values:
            return prepared(empty_model(ENCODER, CLIPVisionConfig.from_pretrained(folder)))
        options = loading_options(folder)
        model, info = CLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True, **options)
        refuse_incomplete(f"the image encoder {folder}", info)
    return prepared(model)


def _parts(
    what: str, source: IPAdapterSource, image_proj: Mapping[str, Tensor], unet: Any, image_encoder: Any, layers: int
) -> IPAdapterParts:
    """The projection to tokens, by diffusers' reading of its tensors, with the image encoder that it reads."""
    with loading(source.file):
        projection = prepared(unet._convert_ip_adapter_image_proj_to_diffusers(dict(image_proj), False))
    penultimate = not isinstance(projection, ImageProjection)
    config = image_encoder.config
    wanted = config.hidden_size if penultimate else config.projection_dim
    if "latents" in image_proj:
        tokens, read = image_proj["latents"].shape[1], image_proj["proj_in.weight"].shape[1]
    elif penultimate:  # one for each of the encoder's
        tokens, read = (config.image_size // config.patch_size) ** 2 + 1, image_proj["proj.0.weight"].shape[1]
    else:
        tokens, read = PLAIN_TOKENS, image_proj["proj.weight"].shape[1]
    if read != wanted:
        raise SourceError(
            f"{what} was made for another image encoder: it reads {read} channels, {source.image_encoder} gives "
            f"{wanted}; name the right one with --image-encoder"
        )
    channels = next(parameter for name, parameter in projection.named_parameters() if name.startswith("norm")).shape[0]
    if channels != unet.config.cross_attention_dim:
        raise SourceError(
            f"{what} was made for another model: its tokens have {channels} channels, the UNet's cross-attention reads "
            f"{unet.config.cross_attention_dim}"
        )
    return IPAdapterParts(
        name=source.name,
        image_encoder=image_encoder,
        projection=projection,
        penultimate=penultimate,
        tokens=tokens,
        layers=layers,
        channels=channels,
    )
