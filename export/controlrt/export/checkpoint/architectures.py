"""What single files leave unsaid: the shapes of Stable Diffusion 1.x, 2.x and XL, and how their pipelines are set up.

A single file holds weights and nothing else. The numbers here are those of the published models; what is not named is
the default of diffusers' and transformers' classes, which were made for Stable Diffusion 1.x.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controlrt.export.checkpoint.clip_tokenizer import END, clip_tokenizer
from controlrt.runtime.errors import SourceError

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A text encoder's config and its tokenizer."""

    config: Any
    projection: bool
    """Whether it projects its pooled output (CLIPTextModelWithProjection)."""
    tokenizer: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything of a pipeline but its weights."""

    name: str
    unet: Config
    vae: Config
    text_encoders: tuple[TextEncoderConfig, ...]
    scheduler: Config
    zero_empty_negative: bool = False


SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
UNET = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}


def stable_diffusion_1() -> Architecture:
    """Stable Diffusion 1.1 to 1.5."""
    return Architecture(
        name="Stable Diffusion 1.x",
        unet=UNET | {"attention_head_dim": 8},
        vae=VAE,
        text_encoders=(_clip_l(),),
        scheduler={"_class_name": "PNDMScheduler", **SCHEDULE, "set_alpha_to_one": False, "skip_prk_steps": True},
    )


def stable_diffusion_2(prediction_type: str) -> Architecture:
    """Stable Diffusion 2.0 and 2.1: 768 pixels with v-prediction, 512 with epsilon."""
    side = 96 if prediction_type == "v_prediction" else 64
    scheduler = {
        "_class_name": "DDIMScheduler",
        **SCHEDULE,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "prediction_type": prediction_type,
    }
    return Architecture(
        name="Stable Diffusion 2.x",
        unet=UNET
        | {
            "sample_size": side,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        vae=VAE | {"sample_size": 8 * side},
        text_encoders=(
            _clip(hidden_size=1024, layers=23, heads=16, activation="gelu", projection_dim=512, pad_token="!"),
        ),
        scheduler=scheduler,
    )


def stable_diffusion_xl(prediction_type: str, *, zero_terminal_snr: bool) -> Architecture:
    """Stable Diffusion XL base; ``zero_terminal_snr`` as v-prediction finetunes train it (Lin et al. 2023)."""
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        **SCHEDULE,
        "timestep_spacing": "leading",
        "prediction_type": prediction_type,
    }
    if zero_terminal_snr:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return Architecture(
        name="Stable Diffusion XL",
        unet={
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae=VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        text_encoders=(
            _clip_l(),
            _clip(
                hidden_size=1280,
                layers=32,
                heads=20,
                activation="gelu",
                projection_dim=1280,
                pad_token="!",
                projection=True,
            ),
        ),
        scheduler=scheduler,
        zero_empty_negative=True,
    )


def consistency_model(architecture: Architecture, time_cond_proj_dim: int) -> Architecture:
    """What was distilled from ``architecture`` to few steps, and is told its guidance scale by an embedding of so many
    channels (Luo et al. 2023, arXiv 2310.04378)."""
    prediction = {key: value for key, value in architecture.scheduler.items() if key == "prediction_type"}
    return replace(
        architecture,
        unet={**architecture.unet, "time_cond_proj_dim": time_cond_proj_dim},
        scheduler={"_class_name": "LCMScheduler", **SCHEDULE, **prediction},
    )


def architecture_of_folder(folder: Path) -> Architecture:
    """The architecture that a diffusers pipeline folder describes; its weights are not looked at.

    Raises:
        SourceError: a config that is missing or cannot be read.
    """
    from transformers import CLIPTextConfig, CLIPTokenizer

    def read(file: str) -> dict[str, Any]:
        try:
            return dict(json.loads((folder / file).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise SourceError(f"--config {folder} has no readable {file}") from error

    index = read("model_index.json")

    def text_encoder(suffix: str) -> TextEncoderConfig:
        part, tokenizer = f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
        if not tokenizer.is_dir():
            raise SourceError(f"--config {folder} has no folder {tokenizer.name}")
        return TextEncoderConfig(
            config=CLIPTextConfig(**read(f"{part}/config.json")),
            projection=index[part][1] == "CLIPTextModelWithProjection",
            tokenizer=lambda: CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True),
        )

    suffixes = [suffix for suffix in ("", "_2") if (index.get(f"text_encoder{suffix}") or [None])[0]]
    return Architecture(
        name=f"what {folder} describes",
        unet=read("unet/config.json"),
        vae=read("vae/config.json"),
        text_encoders=tuple(text_encoder(suffix) for suffix in suffixes),
        scheduler=read("scheduler/scheduler_config.json"),
        zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def empty_model(cls: str, config: Any) -> Any:
    """A model of ``diffusers``, or one of ``transformers``' CLIP, without memory for its weights."""
    library = importlib.import_module("transformers" if cls.startswith("CLIP") else "diffusers")
    return without_values(getattr(library, cls), config)


def without_values(kind: Any, config: Any) -> Any:
    """The model of a class of ``diffusers`` or ``transformers`` without memory for its weights."""
    from accelerate import init_empty_weights

    of_transformers = getattr(kind, "config_class", None) is not None
    with init_empty_weights(include_buffers=False):
        return kind(config) if of_transformers else kind.from_config(dict(config))


def _clip_l() -> TextEncoderConfig:
    return _clip(hidden_size=768, layers=12, heads=12, activation="quick_gelu", projection_dim=768, pad_token=END)


def _clip(
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    activation: str,
    projection_dim: int,
    pad_token: str,
    projection: bool = False,
) -> TextEncoderConfig:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection_dim,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    return TextEncoderConfig(config=config, projection=projection, tokenizer=lambda: clip_tokenizer(pad_token))
