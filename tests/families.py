"""Small randomly initialised checkpoints of the architectures that controlrt supports, as diffusers folders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from controlrt.demo import MODEL_DIR
from controlrt.export.checkpoint.original_names import original_name

CONTROLS = ("first", "second")
SHUFFLE = "shuffle"
"""A control whose residuals are averaged over the picture; Stable Diffusion 1.5 has it."""
UNIONS = {"union": 8, "other": 5}
"""ControlNet Unions and how many control types they have."""
SIDE = 128
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model folder and the folders of its ControlNets and T2I-Adapters."""

    name: str
    model: Path
    controlnets: dict[str, Path]
    adapters: dict[str, Path] = field(default_factory=dict)

    def sources(self) -> dict[str, Any]:
        """Options of an export or a build of all of it; tests that ask for the same share one export."""
        return {
            "model": str(self.model),
            "controlnets": {name: str(path) for name, path in self.controlnets.items()},
            "adapters": {name: str(path) for name, path in self.adapters.items()},
        }

    def reference(self, *controls: str) -> Any:
        """diffusers' own ControlNet pipeline in float32, or its plain one without controls."""
        xl = self.name == "sdxl"
        if not controls:
            cls = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
            pipeline = cls.from_pretrained(self.model)
        else:
            loaded = [ControlNetModel.from_pretrained(self.controlnets[name]).float() for name in controls]
            cls = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
            pipeline = cls.from_pretrained(self.model, controlnet=loaded if len(loaded) > 1 else loaded[0])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(torch.float32)


def _fill_zeros(module: nn.Module, std: float) -> nn.Module:
    """Gives zero convolutions values, so that control shows."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)
    return module


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")


def _vae() -> AutoencoderKL:
    """The same one in all families, which then share its programs."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def _text_encoder(
    tokenizer: CLIPTokenizer, width: int, activation: str, layers: int = 3, cls: Any = CLIPTextModel
) -> Any:
    """The same one wherever it is called with the same. The mean of what it gives is not 0: prompt weights keep it."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = cls(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("final_layer_norm.bias"):
            nn.init.normal_(parameter, mean=0.1, std=0.1)
    return encoder


def _save(
    name: str,
    root: Path,
    pipeline: Any,
    controls: Sequence[str] = CONTROLS,
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
) -> Family:
    pipeline.save_pretrained(root / "model")
    controlnets = {}
    for seed, control in enumerate(controls, 1):
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
        controlnet.register_to_config(global_pool_conditions=control == SHUFFLE)
        _fill_zeros(controlnet, std=0.2).save_pretrained(root / control)
        controlnets[control] = root / control
    for seed, (adapter, config) in enumerate((adapters or {}).items(), 11):
        torch.manual_seed(seed)
        T2IAdapter(**config).save_pretrained(root / adapter)
    return Family(
        name=name,
        model=root / "model",
        controlnets=controlnets,
        adapters={adapter: root / adapter for adapter in adapters or {}},
    )


def sd15(root: Path) -> Family:
    """Stable Diffusion 1.5: four levels of two layers (12+1 residuals), epsilon, Euler; with adapters."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 32, 64, 64),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer, 32, "quick_gelu"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="linspace"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    adapter = {"channels": (32, 32, 64, 64), "num_res_blocks": 1, "downscale_factor": 8}
    adapters = {
        "depth": {**adapter, "in_channels": 3, "adapter_type": "full_adapter"},
        "sketch": {**adapter, "in_channels": 1, "adapter_type": "full_adapter"},
    }
    return _save("sd15", root, pipeline, controls=(*CONTROLS, SHUFFLE), adapters=adapters)


TWO_LEVELS = {
    "sample_size": SIDE // 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}


def inpainting(root: Path) -> Family:
    """Stable Diffusion 1.5 for inpainting: the UNet sees the mask and the masked picture's latents (9 channels)."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer, 32, "quick_gelu", layers=1),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(in_channels=9, **TWO_LEVELS),
        scheduler=DDIMScheduler(**SCALED_LINEAR, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save_with_plain_controlnet("inpainting", root, pipeline, UNet2DConditionModel(**TWO_LEVELS))


def _save_with_plain_controlnet(name: str, root: Path, pipeline: Any, unet: UNet2DConditionModel) -> Family:
    """A model whose UNet takes more than a ControlNet does, which is made for ``unet``."""
    pipeline.save_pretrained(root / "model")
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    _fill_zeros(controlnet, std=0.2).save_pretrained(root / "first")
    return Family(name=name, model=root / "model", controlnets={"first": root / "first"})


TWO_LEVELS_2 = {
    **TWO_LEVELS,
    "cross_attention_dim": 48,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}


def sd21(root: Path) -> Family:
    """Stable Diffusion 2.1 of two levels (4+1 residuals): v-prediction, linear projections, heads by level."""
    return _save("sd21", root, _sd2_pipeline(prediction_type="v_prediction"))


def inpainting_2(root: Path) -> Family:
    """Stable Diffusion 2 for inpainting, of two levels: as sd21, but for epsilon and 9 channels."""
    pipeline = _sd2_pipeline(prediction_type="epsilon", in_channels=9)
    return _save_with_plain_controlnet("inpainting_2", root, pipeline, UNet2DConditionModel(**TWO_LEVELS_2))


def _sd2_pipeline(*, prediction_type: str, in_channels: int = 4) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    tokenizer.pad_token = "!"
    unet = UNet2DConditionModel(in_channels=in_channels, **TWO_LEVELS_2)
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer, 48, "gelu"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            **SCALED_LINEAR, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(root: Path) -> Family:
    """Stable Diffusion XL, one layer a level (6+1 residuals): two text encoders, pooled text and size conditioning."""
    adapter = {"channels": (32, 32, 64, 64), "num_res_blocks": 1, "downscale_factor": 16}
    return _save("sdxl", root, _sdxl_pipeline(), adapters={"depth": {**adapter, "adapter_type": "full_adapter_xl"}})


def sdxl_of_ten(root: Path) -> Family:
    """Stable Diffusion XL with its 9+1 residuals, a ControlNet that pools, and two adapters: slow to trace."""
    adapter = {"channels": (32, 32, 64, 64), "num_res_blocks": 1, "downscale_factor": 16}
    adapter["adapter_type"] = "full_adapter_xl"
    return _save(
        "sdxl",
        root,
        _sdxl_pipeline(layers_per_block=2),
        controls=(*CONTROLS, SHUFFLE),
        adapters={"depth": adapter, "sketch": {**adapter, "in_channels": 1}},
    )


TWO_LEVELS_XL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
}


def inpainting_xl(root: Path) -> Family:
    """Stable Diffusion XL for inpainting, of two levels: the UNet sees the mask and the masked picture's latents."""
    shallow = {**TWO_LEVELS_XL, "transformer_layers_per_block": 1}
    pipeline = _sdxl_pipeline(in_channels=9, **shallow)
    return _save_with_plain_controlnet("sdxl", root, pipeline, _sdxl_pipeline(**shallow).unet)


def union(root: Path) -> Family:
    """Stable Diffusion XL of two levels (4+1 residuals) with a ControlNet and two ControlNet Unions."""
    pipeline = _sdxl_pipeline(**TWO_LEVELS_XL, transformer_layers_per_block=1)
    family = _save("sdxl", root, pipeline, controls=CONTROLS[:1])
    unions = {}
    shared = set(inspect.signature(ControlNetUnionModel.__init__).parameters) & set(pipeline.unet.config)
    for seed, (name, types) in enumerate(UNIONS.items(), 21):
        torch.manual_seed(seed)
        controlnet = ControlNetUnionModel(
            **{key: pipeline.unet.config[key] for key in shared},
            conditioning_embedding_out_channels=(8, 8, 16, 16),
            num_control_type=types,
            num_trans_channel=32,
            num_trans_head=4,
            num_trans_layer=2,
            num_proj_channel=32,
        )
        _fill_zeros(controlnet, std=0.2).save_pretrained(root / name)
        unions[name] = root / name
    return replace(family, controlnets={**family.controlnets, **unions})


def _sdxl_pipeline(**changes: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = _tokenizer(), _tokenizer()
    tokenizer_2.pad_token = "!"
    unet = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 2, 4),
        **changes,
    }
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer, 32, "quick_gelu"),
        text_encoder_2=_text_encoder(tokenizer_2, 48, "gelu", cls=CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=UNet2DConditionModel(
            sample_size=SIDE // 8,
            norm_num_groups=8,
            cross_attention_dim=80,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 48,
            **unet,
        ),
        scheduler=EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
    )


def shallow(root: Path) -> Family:
    """Stable Diffusion 1.5 of two levels with one layer each, quick to trace: four cross-attentions."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer, 32, "quick_gelu", layers=1),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**TWO_LEVELS),
        scheduler=EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="linspace"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save("sd15", root, pipeline, controls=CONTROLS[:1])


def consistency(root: Path) -> Family:
    """A latent consistency model of two levels: the UNet is told its guidance scale, the ControlNet is not."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    unet = UNet2DConditionModel(time_cond_proj_dim=48, **TWO_LEVELS)
    nn.init.normal_(unet.time_embedding.cond_proj.weight)
    pipeline = LatentConsistencyModelPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer, 32, "quick_gelu", layers=1),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=LCMScheduler(**SCALED_LINEAR, original_inference_steps=40, timestep_scaling=8.0),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save_with_plain_controlnet("consistency", root, pipeline, UNet2DConditionModel(**TWO_LEVELS))


def shallow_xl(root: Path) -> Family:
    """Stable Diffusion XL of two levels with one layer each, quick to trace: eight cross-attentions."""
    pipeline = _sdxl_pipeline(**TWO_LEVELS_XL, transformer_layers_per_block=(1, 2))
    return _save("sdxl", root, pipeline, controls=CONTROLS[:1])


FAMILIES = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl}


def _models_of(family: Family) -> dict[str, Any]:
    """UNet and text encoders by name, to look at."""
    if family.model not in _MODELS:
        pipeline = family.reference()
        parts = ("unet", "text_encoder", "text_encoder_2")
        _MODELS[family.model] = {part: model for part in parts if (model := getattr(pipeline, part, None)) is not None}
    return _MODELS[family.model]


_MODELS: dict[Path, dict[str, Any]] = {}


def lora_tensors(
    family: Family, layout: str, *, seed: int, rank: int = 4, alpha: float | None = None, convolutions: bool = False
) -> dict[str, torch.Tensor]:
    """A LoRA for the UNet and the text encoders, with the names that a tool gives its tensors.

    ``layout``: kohya, sgm (kohya's for SDXL), diffusers, processor (diffusers before 0.22), peft.
    """
    models = _models_of(family)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            linear = isinstance(module, nn.Linear) and (layout != "processor" or "attn" in name)
            if "embedding" in name or name == "text_projection" or "time_emb_proj" in name:
                linear = linear and convolutions  # LoCon and LCM-LoRA train these too
            if not (linear or (convolutions and isinstance(module, nn.Conv2d))):
                continue
            if name in ("conv_in", "conv_out"):
                continue
            up_shape = [module.weight.shape[0], rank, *[1] * (module.weight.dim() - 2)]
            down = torch.randn(rank, *module.weight.shape[1:], generator=generator) * module.weight[0].numel() ** -0.5
            up = torch.randn(up_shape, generator=generator) * 0.3
            entry, down_name, up_name = _lora_entry(layout, part, name, family, models["unet"].config)
            tensors[f"{entry}{down_name}"], tensors[f"{entry}{up_name}"] = down, up
            if alpha is not None:
                tensors[f"{entry}.alpha"] = torch.tensor(alpha)
    return tensors


def _lora_entry(layout: str, part: str, name: str, family: Family, config: Any) -> tuple[str, str, str]:
    """How a layout calls an entry and the two factors of it."""
    text = part != "unet"
    wrapped = f"text_model.{name.removeprefix('text_model.')}" if text and name != "text_projection" else name
    if layout in ("kohya", "sgm"):
        prefix = {"unet": "lora_unet", "text_encoder_2": "lora_te2"}.get(
            part, "lora_te1" if family.name == "sdxl" else "lora_te"
        )
        spelled = original_name(name, config) if layout == "sgm" and not text else wrapped
        return f"{prefix}_{spelled.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"
    if layout == "diffusers":
        middle = "lora_linear_layer" if text else "lora"
        return f"{part}.{wrapped}", f".{middle}.down.weight", f".{middle}.up.weight"
    if layout == "processor":
        owner, _, which = wrapped.removesuffix(".0").rpartition(".")
        which = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(which, which)
        entry = f"{part}.{owner}{'' if text else '.processor'}.{which}_lora"
        return entry, ".down.weight", ".up.weight"
    return f"{part}.{wrapped}", ".lora_A.weight", ".lora_B.weight"
