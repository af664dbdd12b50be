"""Pipelines in one file, in the layout that Stable Diffusion was first published in (``model.diffusion_model.*``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from controlrt.export.checkpoint.architectures import (
    Architecture,
    architecture_of_folder,
    consistency_model,
    empty_model,
    stable_diffusion_1,
    stable_diffusion_2,
    stable_diffusion_xl,
)
from controlrt.export.checkpoint.parts import PipelineParts, Reads, text_encoder_name
from controlrt.export.checkpoint.tensor_file import TensorFile, read_tensor_file
from controlrt.runtime.errors import SourceError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
GUIDANCE = "time_embedding.cond_proj.weight"
"""What only a consistency model's UNet has, (channels, time_cond_proj_dim). The original layout has no name for it;
conversion scripts leave it diffusers'."""
PREDICTION_TYPES = ("epsilon", "v_prediction")
OTHER_FILES = (  # what else people have in files of the same suffixes: a word of its tensors' names, and what it is
    (("lora_down.", "lora_A.", "lora.down.", "hada_w1", "lokr_w"), "a LoRA; merge it with --lora into --model"),
    (("control_model.", "controlnet_cond_embedding.", "input_hint_block."), "a ControlNet; give it with --controlnet"),
    (("double_blocks.", "single_transformer_blocks."), "a Flux model"),
    (("joint_blocks.",), "a Stable Diffusion 3 model"),
    (("down_blocks.0.resnets.0.conv1.",), "a UNet alone, in diffusers' layout; give the folder of its whole pipeline"),
    (("encoder.down.0.",), "a VAE alone"),
)


def load_single_file(
    path: Path, config: Path | None = None, prediction_type: str | None = None, reads: Reads = lambda _: True
) -> PipelineParts:
    """The parts of a pipeline in one file.

    Args:
        path: ``.safetensors``, or ``.ckpt`` and the like without code in them.
        config: a diffusers folder that says what the file leaves unsaid; by default one of the published models.
        prediction_type: what the UNet predicts, where neither the file nor its kind tells.
        reads: which parts have values.

    Raises:
        SourceError: a file of something else, an unknown architecture, or tensors that are missing or do not fit it.
    """
    file = read_tensor_file(path)
    if not any(name.startswith(UNET) for name in file.tensors):
        raise SourceError(f"{path} is no Stable Diffusion checkpoint but {_other_file(file)}")
    if any(name.endswith((".scale_weight", ".scale_input")) or name == "scaled_fp8" for name in file.tensors):
        raise SourceError(f"{path} is quantised (scaled_fp8); take the model's float16 or float32 file")
    if config is None:
        architecture = recognise(file, prediction_type)
    else:
        if prediction_type is not None:
            raise SourceError("give one of --config and --prediction-type; the config's scheduler says it already")
        architecture = architecture_of_folder(config)
    return pipeline_parts(file, architecture, reads)


def recognise(file: TensorFile, prediction_type: str | None) -> Architecture:
    """The published architecture whose tensors the file has.

    Raises:
        SourceError: none of them, or a 2.x file of which nobody says what its UNet predicts.
    """
    path, tensors = file.path, file.tensors
    if "edm_mean" in tensors:
        raise SourceError(f"{path} is a Playground 2.5 model, whose EDM sampling is not supported yet")
    widths = {value.shape[-1] for name, value in tensors.items() if name.endswith("attn2.to_k.weight")}
    added = UNET + "label_emb.0.0.weight" in tensors
    said = prediction_type or _said_prediction_type(file)
    if widths == {768} and not added:
        architecture = stable_diffusion_1()
    elif widths == {1024} and not added:
        if said is None:
            raise SourceError(
                f"{path} is Stable Diffusion 2.x, and does not say what its UNet predicts; give --prediction-type "
                "v_prediction (models of 768 pixels) or epsilon (models of 512 pixels, SD-Turbo)"
            )
        architecture = stable_diffusion_2(said)
    elif widths == {2048} and added:
        architecture = stable_diffusion_xl(said or "epsilon", zero_terminal_snr="ztsnr" in tensors)
    elif widths == {1280} and added:
        raise SourceError(f"{path} is the refiner of Stable Diffusion XL; give the base model")
    else:
        found = " and ".join(map(str, sorted(widths))) or "none"
        raise SourceError(
            f"{path} has cross-attention of width {found}; known are Stable Diffusion 1.x (768), 2.x (1024) and XL "
            "(2048); for another one give --config with a diffusers folder of the same architecture"
        )
    if UNET + GUIDANCE in tensors:
        architecture = consistency_model(architecture, tensors[UNET + GUIDANCE].shape[1])
    if said is None or said == architecture.scheduler.get("prediction_type", "epsilon"):
        return architecture
    return replace(architecture, scheduler={**architecture.scheduler, "prediction_type": said})


def _said_prediction_type(file: TensorFile) -> str | None:
    """What the file says of it: in its header, by the mark of XL finetunes, or by 2.0's training script."""
    said = file.metadata.get("modelspec.prediction_type")
    if said is not None:
        return {"v": "v_prediction"}.get(said, said)
    if "v_pred" in file.tensors:
        return "v_prediction"
    if file.global_step is not None and any(name.startswith(OPEN_CLIP[0]) for name in file.tensors):
        return "epsilon" if file.global_step == 875000 else "v_prediction"  # 512-base-ema.ckpt, by diffusers' rule
    return None


def pipeline_parts(file: TensorFile, architecture: Architecture, reads: Reads = lambda _: True) -> PipelineParts:
    """The models of ``architecture`` with the file's weights; those that ``reads`` leaves out have no values.

    Raises:
        SourceError: tensors that are missing, left over or of another shape.
    """
    import diffusers
    from diffusers.loaders import single_file_utils as ldm

    first = file.tensors.get(UNET + "input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None else 4
    unet_config = {**architecture.unet, "in_channels": channels}
    unet = empty_model("UNet2DConditionModel", unet_config)
    vae = empty_model("AutoencoderKL", architecture.vae)
    try:
        unet_tensors = ldm.convert_ldm_unet_checkpoint(dict(file.tensors), unet.config)
        vae_tensors = ldm.convert_ldm_vae_checkpoint(dict(file.tensors), vae.config)
    except (KeyError, AttributeError) as error:
        raise SourceError(f"{file.path} lacks tensors of {architecture.name}: {error}") from error
    if UNET + GUIDANCE in file.tensors:
        unet_tensors[GUIDANCE] = file.tensors[UNET + GUIDANCE]
    if reads("unet"):
        fill(unet, unet_tensors, f"{file.path} (UNet)", architecture.name)
    if reads("vae"):
        fill(vae, vae_tensors, f"{file.path} (VAE)", architecture.name)
    encoders, tokenizers = [], []
    for index, parts in enumerate(architecture.text_encoders):
        cls = "CLIPTextModelWithProjection" if parts.projection else "CLIPTextModel"
        model = empty_model(cls, parts.config)
        what = f"{file.path} (text encoder{f' {index + 1}' if index else ''})"
        if reads(text_encoder_name(index)):
            fill(model, _text_tensors(file, model, index), what, architecture.name)
        encoders.append(model)
        tokenizers.append(parts.tokenizer())
    scheduler = getattr(diffusers, architecture.scheduler["_class_name"]).from_config(dict(architecture.scheduler))
    return PipelineParts(
        unet=unet,
        vae=vae,
        text_encoders=tuple(encoders),
        tokenizers=tuple(tokenizers),
        scheduler=scheduler,
        zero_empty_negative=architecture.zero_empty_negative,
    )


def _text_tensors(file: TensorFile, model: Any, index: int) -> dict[str, Any]:
    """One text encoder's tensors by their names in transformers' class."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    tensors: dict[str, Any] = {}
    if index == 0:
        for prefix in CLIP:
            tensors |= file.having(prefix)
    prefix = OPEN_CLIP[index]
    if not tensors and any(name.startswith(prefix) for name in file.tensors):
        tensors = convert_open_clip_checkpoint(model, _trimmed(file, prefix, model), prefix=prefix)
    wrapped = hasattr(model, "text_model")
    named = {}
    for name, value in tensors.items():
        bare = name.removeprefix("text_model.")
        named[bare if not wrapped or bare.startswith("text_projection") else f"text_model.{bare}"] = value
    if not hasattr(model, "text_projection"):
        named.pop("text_projection.weight", None)
    return named


def _trimmed(file: TensorFile, prefix: str, model: Any) -> dict[str, Any]:
    """OpenCLIP's tensors without the layers that the config leaves off: 2.x reads the last but one."""
    layers = model.config.num_hidden_layers
    start = f"{prefix}transformer.resblocks."
    return {
        name: value
        for name, value in file.tensors.items()
        if not (name.startswith(start) and int(name.removeprefix(start).split(".")[0]) >= layers)
    }


def fill(model: Any, tensors: Mapping[str, Any], what: str, architecture: str) -> None:
    """Puts ``tensors`` into ``model``, every one of them and no other.

    Raises:
        SourceError: missing tensors, left-over ones, or other shapes.
    """
    wanted = model.state_dict()
    named = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    missing = sorted(name for name in wanted if named.get(name) is None)
    if missing:
        raise SourceError(
            f"{what} lacks {len(missing)} of {len(wanted)} tensors of {architecture}, such as {missing[0]}"
        )
    unknown = sorted(set(named) - set(wanted))
    if unknown:
        raise SourceError(f"{what} has {len(unknown)} tensors that {architecture} has not, such as {unknown[0]}")
    for name, value in wanted.items():
        if tuple(named[name].shape) != tuple(value.shape):
            found, allowed = tuple(named[name].shape), tuple(value.shape)
            raise SourceError(f"{what}: {name} has shape {found}, and {architecture} has {allowed}")
    model.load_state_dict(named, strict=True, assign=True)


def _other_file(file: TensorFile) -> str:
    for words, what in OTHER_FILES:
        if any(word in name for name in file.tensors for word in words):
            return what
    return f"something else: {len(file.tensors)} tensors such as {next(iter(file.tensors))}"
