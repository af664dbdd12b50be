"""The web UI's settings: the few that matter here, and the values at which others mean nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from controlrt.runtime.errors import ParameterError, RequestError, UnknownNameError
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.server.pictures_io import Encoding
from controlrt.runtime.server.refusals import refuse_all

OFF: Mapping[str, tuple[Any, ...]] = {
    "sd_vae": ("Automatic", "None", ""),
    "eta_noise_seed_delta": (0,),
    "initial_noise_multiplier": (1,),
    "img2img_extra_noise": (0,),
    "img2img_fix_steps": (False,),
    "img2img_color_correction": (False,),
    "inpainting_mask_weight": (1,),
    "face_restoration": (False,),
    "tiling": (False,),
    "token_merging_ratio": (0,),
    "token_merging_ratio_img2img": (0,),
    "token_merging_ratio_hr": (0,),
    "s_churn": (0,),
    "s_noise": (1,),
    "sd_hypernetwork": ("None", ""),
    "sd_lora": ("None", ""),
    "return_mask": (False,),
    "return_mask_composite": (False,),
}
"""Settings that would change pictures, and the values that leave them; null does too."""
IDLE = (
    "sd_checkpoint_hash",  # what the checkpoint is called decides
    "samples_save",
    "grid_save",
    "return_grid",
    "live_previews_enable",
    "show_progress_every_n_steps",
    "enable_pnginfo",
    "upcast_attn",
    "sd_checkpoint_cache",
    "sd_checkpoints_limit",
    "outdir_samples",
    "outdir_txt2img_samples",
    "outdir_img2img_samples",
    "save_images_add_number",
    "filter_nsfw",
)
"""Settings that mean nothing here."""
FORMATS: Mapping[str, Encoding] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all calls draw with, unless one says otherwise in ``override_settings``."""

    bundle: str
    """``sd_model_checkpoint``."""
    last_layers: int = 1
    """``CLIP_stop_at_last_layers``: 1 for all layers."""
    random_source: Literal["GPU", "CPU", "NV"] = "GPU"
    """``randn_source``: whose generator seeds are for. The web UI's GPU is NVIDIA's."""
    samples_format: str = "png"
    show_control: bool = True
    """Not ``control_net_no_detectmap``: whether answers show control pictures after those that were drawn."""

    @property
    def noise(self) -> Literal["cpu", "gpu"]:
        """Our name of the generator."""
        return "cpu" if self.random_source == "CPU" else "gpu"

    def changed(self, values: Mapping[str, Any], bundles: Mapping[str, Manifest]) -> Self:
        """With other settings, by the web UI's names.

        Raises:
            RequestError: a setting that is not supported, or a value that it cannot have.
        """
        fields: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, value in values.items():
            match name:
                case _ if value is None:
                    pass
                case "sd_model_checkpoint":
                    fields["bundle"] = find_bundle(value, bundles, name)
                case "CLIP_stop_at_last_layers":
                    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value % 1:
                        raise RequestError(str(ParameterError(name, value, "a whole number of at least 1")), name)
                    fields["last_layers"] = int(value)
                case "randn_source":
                    fields["random_source"] = _one_of(name, value, ("GPU", "CPU", "NV"))
                case "samples_format":
                    fields["samples_format"] = _one_of(name, value, tuple(FORMATS))
                case "control_net_no_detectmap":
                    fields["show_control"] = _one_of(name, value, (True, False)) is False
                case _:
                    others[name] = value
        refuse_all(others, OFF, IDLE)
        return dataclasses.replace(self, **fields)

    def shown(self, bundles: Mapping[str, Manifest]) -> dict[str, Any]:
        """All settings, as ``GET options`` tells them."""
        return {
            "sd_model_checkpoint": title(self.bundle, bundles[self.bundle]),
            "sd_checkpoint_hash": bundles[self.bundle].key,
            "CLIP_stop_at_last_layers": self.last_layers,
            "randn_source": self.random_source,
            "samples_format": self.samples_format,
            "control_net_no_detectmap": not self.show_control,
            **{name: values[0] for name, values in OFF.items() if values},
        }


def title(name: str, manifest: Manifest) -> str:
    """What lists call a bundle: its name, and the first digits of its key."""
    return f"{name} [{short_hash(manifest)}]"


def short_hash(manifest: Manifest) -> str:
    """The first digits of a bundle's key."""
    return manifest.key[:10]


def find_bundle(wanted: object, bundles: Mapping[str, Manifest], where: str) -> str:
    """The bundle of a name, a title or a hash.

    Raises:
        RequestError: none.
    """
    for name, manifest in bundles.items():
        if wanted in (name, title(name, manifest), f"{name}.safetensors", short_hash(manifest), manifest.key):
            return name
    raise RequestError(f"{where}: {UnknownNameError('bundle', str(wanted), bundles)}", where)


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise RequestError(str(ParameterError(name, value, f"one of {', '.join(map(str, allowed))}")), name)
    return value
