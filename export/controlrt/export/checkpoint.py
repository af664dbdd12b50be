"""Loading checkpoints: diffusers folders, hub ids and single files, with any number of ControlNets."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlrt.runtime.errors import SourceError
from controlrt.runtime.storage import sha256_file

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
PIPELINES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    },
    "StableDiffusionXLPipeline": {"feature_extractor": None, "image_encoder": None},
}
"""Supported pipelines, and the parts of each that are not loaded."""

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
PIPELINE_PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
WEIGHTED_PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
# what a pipeline or a ControlNet on the hub is made of, without its doubles in other precisions and formats
HUB_FILES = [
    "model_index.json",
    "config.json",
    "diffusion_pytorch_model*",
    *(f"{part}/*" for part in PIPELINE_PARTS),
]
HUB_IGNORED = ["*.bin", "*.fp16.*", "*non_ema*", "*.msgpack", "*.onnx*", "*openvino*", "*.md"]


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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded pipeline, in float32, with its ControlNets and T2I-Adapters by name."""

    unet: Any
    vae: Any
    text_encoders: tuple[TextEncoderParts, ...]
    scheduler_config: dict[str, Any]
    controlnets: dict[str, Any]
    adapters: dict[str, Any]
    zero_empty_negative: bool

    @property
    def vae_float32(self) -> bool:
        """Whether the VAE's activations leave the range of float16, by the rule of diffusers' XL pipelines."""
        return self.time_ids and bool(self.vae.config.get("force_upcast", True))

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def time_ids(self) -> bool:
        """Whether the UNet takes SDXL's size and crop conditioning."""
        return bool(self.unet.config.addition_embed_type == "text_time")


def resolve(source: str, what: str) -> Path:
    """The local folder or file of a checkpoint: a path as it is, a hub id from the local cache or the hub.

    Raises:
        SourceError: no such path, or the hub does not have it or cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix in SINGLE_FILE_SUFFIXES:
        raise SourceError(f"{what} {source} does not exist; give a diffusers folder, a .safetensors file or a hub id")
    from huggingface_hub import snapshot_download

    try:  # falls back to its local cache by itself, and asks nothing of the network with HF_HUB_OFFLINE=1
        path = Path(snapshot_download(source, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
        if not any(path.rglob("*.safetensors")):  # only in another format or precision
            path = Path(snapshot_download(source, allow_patterns=HUB_FILES))
        return path
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{what} {source} is no path here, and the hub and its local cache say: {reason}") from error


def digest_files(path: Path) -> dict[str, str]:
    """SHA-256 of the files of a resolved checkpoint that decide what is built, by relative name.

    Raises:
        SourceError: the folder is no diffusers model.
    """
    if path.is_file():
        return {path.name: sha256_file(path)}
    if (path / "model_index.json").is_file():
        parts = [path / part for part in PIPELINE_PARTS if (path / part).is_dir()]
        files = [path / "model_index.json", *(file for part in parts for file in part.rglob("*") if file.is_file())]
    elif (path / "config.json").is_file():
        files = [file for file in path.iterdir() if file.is_file()]
    else:
        raise SourceError(f"{path} is no diffusers folder: it has neither model_index.json nor config.json")
    return {file.relative_to(path).as_posix(): sha256_file(file) for file in sorted(files)}


def load(model: Path, controlnets: Mapping[str, Path], adapters: Mapping[str, Path]) -> Checkpoint:
    """Loads a resolved pipeline, its ControlNets and its T2I-Adapters in float32.

    Raises:
        SourceError: damaged weights, an architecture that is not Stable Diffusion 1.x, 2.x or XL, or a ControlNet
            or adapter that was made for another architecture.
    """
    pipeline = _from_single_file(model) if model.is_file() else _from_folder(model)
    unet, vae = _prepared(pipeline.unet), _prepared(pipeline.vae)
    loaded = Checkpoint(
        unet=unet,
        vae=vae,
        text_encoders=_text_encoders(pipeline),
        scheduler_config=stored_scheduler_config(pipeline.scheduler),
        controlnets={name: _load_controlnet(name, path, unet, vae) for name, path in controlnets.items()},
        adapters={name: _load_adapter(name, path, unet) for name, path in adapters.items()},
        zero_empty_negative=bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
    )
    _refuse_unsupported(model, loaded)
    return loaded


def stored_scheduler_config(scheduler: Any) -> dict[str, Any]:
    """What the checkpoint itself says of its scheduler, without the class's defaults.

    So another sampler falls back to its own defaults, as diffusers' ``from_config`` does.
    """
    defaults = set(scheduler.config.get("_use_default_values", ()))
    said = {key: value for key, value in scheduler.config.items() if not key.startswith("_") and key not in defaults}
    return {"_class_name": type(scheduler).__name__, **said}


def _from_folder(path: Path) -> Any:
    import diffusers

    if not (path / "model_index.json").is_file():
        raise SourceError(f"{path} has no model_index.json: it is not a whole pipeline")
    with _loading(path):
        index = json.loads((path / "model_index.json").read_text())
        name = index["_class_name"]
    if name not in PIPELINES:
        raise SourceError(f"{path} is a {name}; supported: {', '.join(PIPELINES)}")
    with _loading(path):
        parts = {part: _load_part(path / part, *index[part]) for part in WEIGHTED_PARTS if index.get(part, [None])[0]}
        return getattr(diffusers, name).from_pretrained(path, **parts, **PIPELINES[name], **_options(path / "unet"))


def _load_part(folder: Path, library: str, name: str) -> Any:
    """One model of a pipeline's folder. By itself a pipeline leaves weights that are missing at random values."""
    if library not in ("diffusers", "transformers"):
        raise SourceError(f"{folder} is a {library}.{name}; supported: classes of diffusers and transformers")
    load = getattr(importlib.import_module(library), name).from_pretrained
    model, info = load(folder, output_loading_info=True, **_options(folder))
    _refuse_incomplete(str(folder), info)
    return model


def _refuse_incomplete(what: str, info: Mapping[str, Any]) -> None:
    """Raises SourceError where a loader found no tensor for a parameter."""
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise SourceError(f"{what} lacks {len(info['missing_keys'])} tensors, such as {first}")


def _from_single_file(path: Path) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    with _loading(path):
        kind = infer_diffusers_model_type(load_single_file_checkpoint(str(path)))
        if kind.startswith("xl"):
            return StableDiffusionXLPipeline.from_single_file(str(path))
        return StableDiffusionPipeline.from_single_file(str(path), safety_checker=None)


def _load_controlnet(name: str, path: Path, unet: Any, vae: Any) -> Any:
    from diffusers import ControlNetModel

    with _loading(path):
        if path.is_file():
            controlnet = ControlNetModel.from_single_file(str(path))
            _refuse_foreign(name, path, controlnet.config, unet, vae)
            return _prepared(controlnet)
        config = json.loads((path / "config.json").read_text())
        if config.get("_class_name") != "ControlNetModel":
            raise SourceError(
                f"ControlNet {name} ({path}) is a {config.get('_class_name')}; supported: ControlNetModel"
            )
        _refuse_foreign(name, path, config, unet, vae)
        controlnet, info = ControlNetModel.from_pretrained(path, output_loading_info=True, **_options(path))
        _refuse_incomplete(f"ControlNet {name} ({path})", info)
        return _prepared(controlnet)


def _load_adapter(name: str, path: Path, unet: Any) -> Any:
    from diffusers import T2IAdapter

    with _loading(path):
        if path.is_file():
            raise SourceError(f"adapter {name} ({path}) is a single file; give a diffusers folder or a hub id")
        config = json.loads((path / "config.json").read_text())
        if config.get("_class_name") != "T2IAdapter":
            raise SourceError(f"adapter {name} ({path}) is a {config.get('_class_name')}; supported: T2IAdapter")
        adapter, info = T2IAdapter.from_pretrained(path, output_loading_info=True, **_options(path))
        _refuse_incomplete(f"adapter {name} ({path})", info)
    xl = unet.config.addition_embed_type == "text_time"
    kind = str(config.get("adapter_type", "full_adapter"))
    if kind.endswith("_xl") != xl:
        made, wanted = ("SDXL", "is not SDXL") if kind.endswith("_xl") else ("Stable Diffusion 1.x", "is SDXL")
        raise SourceError(f"adapter {name} ({path}) was made for {made} ({kind}), but the model {wanted}")
    channels = list(unet.config.block_out_channels)
    if list(config.get("channels", channels))[: len(channels)] != channels and not xl:
        raise SourceError(
            f"adapter {name} ({path}) was made for another model: its channels are {config.get('channels')}, "
            f"the UNet's {channels}"
        )
    return _prepared(adapter)


def _refuse_foreign(name: str, path: Path, config: Mapping[str, Any], unet: Any, vae: Any) -> None:
    """Raises SourceError for a ControlNet whose residuals would not fit the UNet."""
    fields = ("cross_attention_dim", "in_channels", "block_out_channels", "layers_per_block", "addition_embed_type")
    for field in fields:
        # a UNet of inpainting sees more than latents, its ControlNets do not
        theirs = vae.config.latent_channels if field == "in_channels" else unet.config[field]
        ours = config.get(field, theirs)
        if ours != theirs and not (isinstance(ours, (list, tuple)) and list(ours) == list(theirs)):
            raise SourceError(
                f"ControlNet {name} ({path}) was made for another model: {field} is {ours}, the UNet has {theirs}"
            )


def _refuse_unsupported(path: Path, loaded: Checkpoint) -> None:
    """Raises SourceError for what would draw another picture than diffusers, rather than draw it."""
    unet, vae = loaded.unet.config, loaded.vae.config
    allowed: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("the UNet's in_channels", unet.in_channels, (loaded.latent_channels, 2 * loaded.latent_channels + 1)),
        ("the UNet's time_cond_proj_dim", unet.time_cond_proj_dim, (None,)),
        ("the UNet's addition_embed_type", unet.addition_embed_type, (None, "text_time")),
        ("the UNet's class_embed_type", unet.class_embed_type, (None,)),
        ("the UNet's encoder_hid_dim_type", unet.encoder_hid_dim_type, (None,)),
        ("the VAE's latents_mean", vae.get("latents_mean"), (None,)),
    ]
    for name, controlnet in loaded.controlnets.items():
        config = controlnet.config
        allowed.append((f"ControlNet {name}'s conditioning_channels", config.conditioning_channels, (1, 3)))
    for what, found, supported in allowed:
        if found not in supported:
            listed = " or ".join(str(value) for value in supported)
            raise SourceError(f"{path}: {what} is {found}, which is not supported yet; supported: {listed}")


def _text_encoders(pipeline: Any) -> tuple[TextEncoderParts, ...]:
    xl = getattr(pipeline, "text_encoder_2", None) is not None
    found = [("text_encoder", pipeline.text_encoder, pipeline.tokenizer)]
    if xl:
        found.append(("text_encoder_2", pipeline.text_encoder_2, pipeline.tokenizer_2))
    return tuple(
        TextEncoderParts(
            name=name,
            model=_prepared(model),
            tokenizer=tokenizer,
            max_length=min(tokenizer.model_max_length, model.config.max_position_embeddings),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            penultimate=xl,
            pooled=name == "text_encoder_2",
        )
        for name, model, tokenizer in found
        if model is not None
    )


def _options(folder: Path) -> dict[str, Any]:
    """Loading options: no network, and the fp16 files where a folder has no others."""
    options: dict[str, Any] = {"local_files_only": True}
    names = [file.name for file in folder.glob("*") if file.suffix in WEIGHTS_SUFFIXES]
    if names and all(".fp16." in name for name in names):
        options["variant"] = "fp16"
    return options


def _prepared(module: Any) -> Any:
    return module.float().eval().requires_grad_(False)


@contextlib.contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Keeps the loaders quiet and turns whatever they raise into a SourceError that names the checkpoint."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # every loader has exceptions of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"cannot load {path}: {reason}") from error
