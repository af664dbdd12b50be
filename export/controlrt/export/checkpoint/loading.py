"""Loading a pipeline with its LoRAs and ControlNets: from wherever it lies to modules that can be traced."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from controlrt.export.checkpoint.adapter import feature_places, load_adapter
from controlrt.export.checkpoint.controlnet import load_controlnet
from controlrt.export.checkpoint.folder import load_folder
from controlrt.export.checkpoint.parts import (
    Checkpoint,
    IPAdapterSource,
    LoraSource,
    PipelineParts,
    TextEncoderParts,
    text_encoder_name,
)
from controlrt.export.checkpoint.quiet_loading import loading, prepared
from controlrt.export.checkpoint.single_file import load_single_file
from controlrt.runtime.errors import SourceError
from controlrt.runtime.profile import CHUNK_TOKENS


def load(
    model: Path,
    controlnets: Mapping[str, Path],
    loras: Sequence[LoraSource] = (),
    *,
    adapters: Mapping[str, Path] | None = None,
    ip_adapters: Sequence[IPAdapterSource] = (),
    config: Path | None = None,
    prediction_type: str | None = None,
    only: Collection[str] | None = None,
) -> Checkpoint:
    """Loads a resolved pipeline, its ControlNets and T2I-Adapters in float32, with LoRAs merged into the pipeline.

    Args:
        model: a diffusers folder or a single file.
        controlnets, adapters: by name.
        ip_adapters: attached to the UNet.
        loras: merged in any order; their differences add up.
        config: for a single file, a diffusers folder that says what it leaves unsaid.
        prediction_type: for a single file, what the UNet predicts.
        only: the parts whose weights are read, by the names of ``ProgramSpec.part``, or all of them. The others are on
            PyTorch's meta device, with shapes and configs and without values; adapters are read all the same.

    Raises:
        SourceError: damaged weights, an architecture that is not Stable Diffusion 1.x, 2.x or XL, or a ControlNet,
            adapter or LoRA that was made for another architecture.
    """
    # these bring PyTorch, which finding a cached export does not need
    from controlrt.export.checkpoint.ip_adapter import attach_ip_adapters
    from controlrt.export.checkpoint.lora import merge_loras

    def reads(part: str) -> bool:
        return only is None or part in only

    if model.is_file():
        with loading(model):
            pipeline = load_single_file(model, config, prediction_type, reads)
    elif config is not None or prediction_type is not None:
        option = "--config" if config is not None else "--prediction-type"
        raise SourceError(f"{option} is for single files; {model} is a folder and has configs of its own")
    else:
        pipeline = load_folder(model, reads)
    unet, vae = prepared(pipeline.unet), prepared(pipeline.vae)
    encoders = {text_encoder_name(index): prepared(one) for index, one in enumerate(pipeline.text_encoders)}
    merge_loras({"unet": unet, **encoders}, loras)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    loaded = Checkpoint(
        unet=unet,
        vae=vae,
        text_encoders=_text_encoders(pipeline, encoders),
        scheduler_config=stored_scheduler_config(pipeline.scheduler),
        controlnets={
            name: load_controlnet(name, path, unet, values=reads(f"controlnet.{name}"))
            for name, path in controlnets.items()
        },
        adapters={name: load_adapter(name, path, unet, scale) for name, path in (adapters or {}).items()},
        ip_adapters=(),
        zero_empty_negative=pipeline.zero_empty_negative,
    )
    _refuse_unsupported(model, loaded)
    return replace(loaded, ip_adapters=attach_ip_adapters(unet, ip_adapters, reads))


def stored_scheduler_config(scheduler: Any) -> dict[str, Any]:
    """What the checkpoint itself says of its scheduler, without the class's defaults.

    So another sampler falls back to its own defaults, as diffusers' ``from_config`` does.
    """
    defaults = set(scheduler.config.get("_use_default_values", ()))
    said = {key: value for key, value in scheduler.config.items() if not key.startswith("_") and key not in defaults}
    return {"_class_name": type(scheduler).__name__, **said}


def _text_encoders(pipeline: PipelineParts, encoders: Mapping[str, Any]) -> tuple[TextEncoderParts, ...]:
    xl = len(encoders) > 1
    return tuple(
        TextEncoderParts(
            name=name,
            model=model,
            tokenizer=tokenizer,
            max_length=min(tokenizer.model_max_length, model.config.max_position_embeddings),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            penultimate=xl,
            pooled=name == "text_encoder_2",
        )
        for (name, model), tokenizer in zip(encoders.items(), pipeline.tokenizers, strict=True)
    )


def _refuse_unsupported(path: Path, loaded: Checkpoint) -> None:
    """Raises SourceError for what would draw another picture than diffusers, rather than draw it."""
    unet, vae = loaded.unet.config, loaded.vae.config
    allowed: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("the UNet's in_channels", unet.in_channels, (loaded.latent_channels, 2 * loaded.latent_channels + 1)),
        ("the UNet's addition_embed_type", unet.addition_embed_type, (None, "text_time")),
        ("the UNet's class_embed_type", unet.class_embed_type, (None,)),
        ("the UNet's encoder_hid_dim_type", unet.encoder_hid_dim_type, (None,)),
        ("the VAE's latents_mean", vae.get("latents_mean"), (None,)),
    ]
    allowed += [(f"{parts.name}'s length", parts.max_length, (CHUNK_TOKENS,)) for parts in loaded.text_encoders]
    for name, controlnet in loaded.controlnets.items():
        config = controlnet.config
        allowed.append((f"ControlNet {name}'s conditioning_channels", config.conditioning_channels, (1, 3)))
        allowed.append((f"ControlNet {name}'s class_embed_type", config.class_embed_type, (None,)))
    levels = [len(feature_places(adapter, loaded.vae_scale_factor)) for adapter in loaded.adapters.values()]
    allowed += [  # features are summed
        (f"adapter {name}'s number of features", found, (levels[0],))
        for name, found in zip(loaded.adapters, levels, strict=True)
    ]
    for what, found, supported in allowed:
        if found not in supported:
            listed = " or ".join(str(value) for value in supported)
            raise SourceError(f"{path}: {what} is {found}, which is not supported yet; supported: {listed}")
