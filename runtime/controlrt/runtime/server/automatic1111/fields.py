"""The fields of the web UI's requests: those that are supported, and the values at which the others mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from controlrt.runtime.server.refusals import refuse_all

OFF: Mapping[str, tuple[Any, ...]] = {
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None", "none"),
    "disable_extra_networks": (False,),
    "firstpass_image": (),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "comments": ({},),
    "infotext": ("",),
    "script_name": ("", "None", "none"),
    "save_images": (False,),
    "latent_mask": (),
    "initial_noise_multiplier": (1,),
    "mask_round": (True,),
}
"""What is not supported, and the values that change nothing; null never does."""
IDLE = (
    "subseed",  # without a strength
    "s_tmax",  # without churn
    "s_tmin",
    "refiner_switch_at",  # without a refiner
    "script_args",  # without a script
    "do_not_save_samples",  # nothing is saved
    "do_not_save_grid",
    "image_cfg_scale",  # of models that are told what to change (InstructPix2Pix) alone
)
"""What means nothing here, whatever it is."""


PARAMETERS: Mapping[str, str] = {
    "batch (prompts x num_images_per_prompt)": "batch_size",
    "controlnet_conditioning_scale": "weight",
    "control_guidance_end": "guidance_end",
    "control_guidance_start": "guidance_start",
    "control_layer_weights": "advanced_weighting",
    "clip_skip": "CLIP_stop_at_last_layers",
    "guidance_scale": "cfg_scale",
    "init_image": "init_images",
    "mask_image": "mask",
    "num_images_per_prompt": "batch_size",
    "num_inference_steps": "steps",
    "scheduler": "sampler_name",
    "strength": "denoising_strength",
}
"""The web UI's names of the pipeline's arguments, where they differ."""


class Call(BaseModel):
    """What both requests have. Fields that are null are as if they were not there."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    sampler_name: str = ""
    sampler_index: str = "Euler"
    """What the sampler was called by earlier; ``sampler_name`` goes before it."""
    scheduler: str = ""
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    steps: int = Field(50, ge=1)
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    eta: float | None = None
    override_settings: dict[str, Any] = Field(default_factory=dict)
    override_settings_restore_afterwards: bool = True
    send_images: bool = True
    force_task_id: str = ""
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    def refuse(self) -> None:
        """Raises RequestError where a field that is not supported would change what is drawn."""
        refuse_all(self.model_extra or {}, OFF, IDLE)


class Txt2Img(Call):
    """Text to image, with hires fix."""

    enable_hr: bool = False
    denoising_strength: float = Field(0.75, ge=0, le=1)
    """Of the second pass."""
    hr_scale: float = Field(2.0, gt=0, le=16)
    hr_upscaler: str = ""
    hr_second_pass_steps: int = Field(0, ge=0)
    hr_resize_x: int = Field(0, ge=0)
    hr_resize_y: int = Field(0, ge=0)
    hr_checkpoint_name: str = ""
    hr_sampler_name: str = ""
    hr_scheduler: str = ""
    hr_prompt: str = ""
    hr_negative_prompt: str = ""


class Img2Img(Call):
    """Picture to picture and inpainting."""

    init_images: list[str] = Field(default_factory=list)
    resize_mode: int = 0
    denoising_strength: float = Field(0.75, ge=0, le=1)
    mask: str = ""
    mask_blur: float | None = Field(None, ge=0, le=256)
    mask_blur_x: float = Field(4, ge=0, le=256)
    mask_blur_y: float = Field(4, ge=0, le=256)
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = Field(0, ge=0)
    inpainting_mask_invert: int = 0
    include_init_images: bool = False
