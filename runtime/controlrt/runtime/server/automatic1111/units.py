"""Units of the web UI's ControlNet extension: what they ask for, as arguments of the pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from controlrt.runtime.annotators import ANNOTATORS, Annotator, annotate, annotator_called
from controlrt.runtime.annotators.annotator import PROCESSOR_RES
from controlrt.runtime.errors import ParameterError, RequestError, UnknownNameError, UserError
from controlrt.runtime.fitting import Fit, fit, pixel_perfect_resolution, resize_named
from controlrt.runtime.manifest import Control, Manifest
from controlrt.runtime.pictures import MASKED, Picture
from controlrt.runtime.scales import control_mode
from controlrt.runtime.server.automatic1111.repainting import Box
from controlrt.runtime.server.pictures_io import PictureReader
from controlrt.runtime.server.refusals import refuse_all

PROCESSOR_RESOLUTION = 512
"""The extension's default of ``processor_res``."""
THRESHOLDS: Mapping[str, int] = {
    "canny": 2,
    "scribble_xdog": 1,
    "normal_map": 1,
    "tile_resample": 1,
    "blur_gaussian": 1,
    "threshold": 1,
}
"""How many thresholds a module has in the extension; to others they mean nothing."""
Pass = Literal["low", "high"]
"""Of hires fix."""
ALIASES: Mapping[str, str] = {
    "input_image": "image",
    "mask_image": "mask",
    "preprocessor": "module",
    "guidance": "guidance_end",
    "lowvram": "low_vram",
}
"""Other names of fields."""
OFF: Mapping[str, tuple[Any, ...]] = {
    "input_mode": ("simple",),
    "batch_images": ("", []),
    "batch_image_dir": ("",),
    "batch_mask_dir": ("",),
    "batch_modifiers": ([],),
    "loopback": (False,),
    "guessmode": (False, 0),
    "use_preview_as_input": (False,),
    "generated_image": (),
    "animatediff_batch": (False,),
    "ipadapter_input": ([],),
    "union_control_type": ("Unknown",),
    "ip_adapter_model": (),
}
"""What changes nothing; null never does."""
IDLE = ("output_dir", "low_vram", "is_ui", "pulid_mode")
"""What means nothing here, whatever it is."""


class Unit(BaseModel):
    """One unit. Fields that are null are as if they were not there."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    enabled: bool = True
    module: str = "none"
    model: str = "None"
    weight: float = 1.0
    image: str | dict[str, str | None] | list[Any] | None = None
    mask: str | None = None
    resize_mode: str | int = "Crop and Resize"
    processor_res: float = -1
    threshold_a: float = -1
    threshold_b: float = -1
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    control_mode: str | int = 0
    pixel_perfect: bool = False
    hr_option: str = "Both"
    inpaint_crop_input_image: bool = True
    advanced_weighting: list[float] | None = None
    effective_region_mask: str | None = None
    save_detected_map: bool = True
    place: str = Field(default="", exclude=True)
    """Where the unit is in the request, for messages."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Aliases as what they stand for."""
        if not isinstance(values, dict):
            raise ValueError("is not an object with the fields of a unit")
        named: dict[str, Any] = {}
        for key, value in values.items():
            if value is None:
                continue
            field = ALIASES.get(str(key), str(key))
            if field in named:
                raise ValueError(f"gives {field} twice, once as {key}")
            named[field] = value
        return named

    def runs_in(self, drawn: Pass | None) -> bool:
        """Whether it acts in a pass of hires fix; it always does without."""
        option = self.hr_option.lower().removeprefix("hiresfixoption.")
        names: dict[str, tuple[Pass, ...]] = {
            "both": ("low", "high"),
            "low res only": ("low",),
            "high res only": ("high",),
        }
        if option not in names:
            known = ["Both", "Low res only", "High res only"]
            raise RequestError(str(UnknownNameError(f"hr_option of {self.place}", self.hr_option, known)), self.place)
        return drawn is None or drawn in names[option]


@dataclass(frozen=True, kw_only=True)
class Around:
    """What units see of the request that they are in."""

    width: int
    height: int
    max_pixels: int
    """That an annotator may work on."""
    picture: Image.Image | None = None
    """What picture to picture starts from, as it came; units without a picture take it."""
    mask: Image.Image | None = None
    """Its mask, white where it is drawn anew, of the same size."""
    crop: Box | None = None
    """The part of the picture that is drawn alone."""


@dataclass(frozen=True, kw_only=True)
class Controls:
    """What units come to."""

    arguments: dict[str, Any]
    """Those of the pipeline; empty where no unit acts."""
    detected: tuple[Image.Image, ...] = ()
    """The control pictures that the answer shows after those that were drawn."""
    comments: tuple[str, ...] = ()


def read_units(scripts: Mapping[str, Any]) -> list[Unit]:
    """The units in ``alwayson_scripts`` that are on.

    Raises:
        RequestError: another script that is on, or a unit that cannot be read.
    """
    units = []
    for name, script in scripts.items():
        where = f"alwayson_scripts.{name}"
        args = script.get("args", []) if isinstance(script, Mapping) else script
        if not isinstance(args, list):
            raise RequestError(f"{where} must be an object with a list args", where)
        if name.lower() != "controlnet":
            if not _off(args):
                raise RequestError(f"{where} is not here; leave it out (there is controlnet)", where)
            continue
        for index, values in enumerate(args):
            place = f"{where}.args[{index}]"
            if values is False or (isinstance(values, dict) and values.get("enabled") is False):
                continue
            try:
                unit = Unit.model_validate(values)
            except ValueError as error:
                raise RequestError(f"{place} {_first(error)}", place) from None
            unit.place = place
            if unit.enabled:  # it may be written as 0 or "off"
                refuse_all(unit.model_extra or {}, OFF, IDLE, place)
                units.append(unit)
    return units


def _off(args: list[Any]) -> bool:
    """Whether a script's arguments say that it does nothing."""
    if not args or args[0] is False:
        return True
    return all(
        isinstance(each, dict) and (each.get("enabled") is False or each.get("enable") is False) for each in args
    )


def _first(error: ValueError) -> str:
    """The first thing that is wrong, without pydantic's words around it."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def control_arguments(
    units: Sequence[Unit], manifest: Manifest, reader: PictureReader, around: Around, drawn: Pass | None = None
) -> Controls:
    """The arguments of the units that act. Decodes pictures and runs annotators: work for a thread.

    Args:
        units: those that are on.
        manifest: of the bundle.
        reader: for their pictures.
        around: the request.
        drawn: which pass of hires fix; None without.

    Raises:
        RequestError: a unit that the bundle cannot do, naming it and the field.
    """
    per_control: dict[str, dict[str, Any]] = {}
    detected, comments = [], []
    for unit in units:
        if not unit.runs_in(drawn):
            continue
        control = find_control(unit.model, manifest, f"{unit.place}.model")
        if control.name in per_control.get("image", {}):
            raise RequestError(f"{unit.place}.model is {control.name}, which another unit has already", unit.place)
        arguments = _arguments(unit, reader, around)
        for name, value in arguments.items():
            per_control.setdefault(name, {})[control.name] = value
        if unit.save_detected_map:
            detected.append(shown(arguments["image"]))
        annotator = find_module(unit.module, f"{unit.place}.module")
        if unit.module.lower() in annotator.stands_in_for:
            comments.append(f"{unit.module} is a network; the filter {annotator.name} stands in for it")
    return Controls(arguments=per_control, detected=tuple(detected), comments=tuple(comments))


def _arguments(unit: Unit, reader: PictureReader, around: Around) -> dict[str, Any]:
    """The arguments of one unit, each for its control."""
    mode = _checked(unit, "control_mode", lambda: control_mode(unit.control_mode))
    arguments: dict[str, Any] = {
        "image": _checked(unit, "image", lambda: _control(unit, reader, around)),
        "controlnet_conditioning_scale": unit.weight,
        "control_guidance_start": unit.guidance_start,
        "control_guidance_end": unit.guidance_end,
        "control_mode": mode,
    }
    if unit.advanced_weighting is not None:
        if mode != "balanced":
            error = ParameterError("control_mode", mode, "balanced with advanced_weighting")
            raise RequestError(f"{unit.place}: {error}", unit.place)
        arguments["control_layer_weights"] = unit.advanced_weighting
    if unit.effective_region_mask:
        region = reader.decode_text(unit.effective_region_mask, f"{unit.place}.effective_region_mask")
        arguments["control_region"] = fit(region.convert("L"), around.width, around.height, "stretch")
    return arguments


def control_title(control: Control, manifest: Manifest) -> str:
    """What the list of models calls a control: its name, and what its files are known by."""
    return f"{control.name} [{manifest.provenance.sources.get(control.part, manifest.key)[:8]}]"


def find_control(model: str, manifest: Manifest, where: str) -> Control:
    """The control that a unit's model names: by its name or the last part of its source, a hash behind it or not.

    Raises:
        RequestError: none.
    """
    wanted = re.sub(r"\[[0-9a-fA-F]*\]$", "", model.strip()).rstrip().lower()
    for control in manifest.controls:
        source = re.sub(r"\.(safetensors|pth|ckpt|bin)$", "", control.source.rstrip("/").rsplit("/", 1)[-1])
        if wanted in (control.name.lower(), source.lower()):
            return control
    known = [control.name for control in manifest.controls]
    raise RequestError(f"{where}: {UnknownNameError('model', model, known)}", where)


def find_module(module: str, where: str) -> Annotator:
    """The annotator that a unit's module names.

    Raises:
        RequestError: none.
    """
    try:
        return annotator_called(module)
    except UnknownNameError:
        names = [name for annotator in ANNOTATORS.values() for name in annotator.names]
        missing = UnknownNameError("module", module, names, "give the control picture itself: none", show=ANNOTATORS)
        raise RequestError(f"{where}: {missing}", where) from None


def module_values(
    module: str, annotator: Annotator, processor_res: float, threshold_a: float, threshold_b: float
) -> dict[str, float]:
    """The parameters of a module, as the extension has them: one that is out of its range is the default."""
    known = {parameter.name: parameter for parameter in annotator.parameters}
    values: dict[str, float] = {}
    if PROCESSOR_RES.name in known:
        fits = 0 < processor_res <= PROCESSOR_RES.maximum and float(processor_res).is_integer()
        values[PROCESSOR_RES.name] = int(processor_res) if fits else PROCESSOR_RESOLUTION
    sliders = 0 if module.lower() in annotator.stands_in_for else THRESHOLDS.get(annotator.name, 0)
    for name, value in (("threshold_a", threshold_a), ("threshold_b", threshold_b))[:sliders]:
        if known[name].minimum <= value <= known[name].maximum:
            values[name] = value
    return values


def check_working_size(values: Mapping[str, float], picture: Image.Image, max_pixels: int, where: str) -> None:
    """Refuses a resolution at which a picture of these proportions has too many pixels.

    Raises:
        RequestError: it has more than ``max_pixels``.
    """
    shorter = values.get(PROCESSOR_RES.name, 0)
    pixels = shorter**2 * max(picture.size) / min(picture.size)
    if pixels > max_pixels:
        raise RequestError(
            f"{where}: a picture of {picture.width}x{picture.height} pixels whose shorter side is made {shorter:g} has "
            f"more than {max_pixels:,}, the most that this server reads",
            where,
        )


def missing_package(error: ModuleNotFoundError, module: str, where: str) -> RequestError:
    """What is said of a module that needs what is not installed."""
    return RequestError(
        f"{where} {module!r} needs {error.name}, which is not installed on this server (controlrt[annotate]); "
        "send the control picture itself, with module none",
        where,
    )


def shown(picture: Picture) -> Image.Image:
    """A control picture as people look at it; what inpainting paints is black."""
    if isinstance(picture, Image.Image):
        return picture
    planes = np.where(picture == MASKED, 0, picture)
    return Image.fromarray(np.round(planes * 255).astype(np.uint8))


def _control(unit: Unit, reader: PictureReader, around: Around) -> Picture:
    """The control picture of a unit, of the size that is drawn."""
    where = f"{unit.place}.image"
    annotator = find_module(unit.module, f"{unit.place}.module")
    mode = _checked(unit, "resize_mode", lambda: resize_named(unit.resize_mode))
    picture, own_mask = _own_pictures(unit, reader)
    mask = own_mask
    if picture is None:
        if around.picture is None:
            raise RequestError(f"{where} is missing; a unit without a picture needs img2img", where)
        picture, mask = around.picture, own_mask or around.mask
    if mask is not None and mask.size != picture.size:
        mask = mask.resize(picture.size, Image.Resampling.NEAREST)
    if annotator.needs_mask and mask is None:
        raise RequestError(f"{unit.place}.mask is missing; {unit.module} paints where it is white", where)
    if around.crop is not None and unit.inpaint_crop_input_image and around.picture is not None:
        picture = _cropped(picture, mode, around.picture.size, around.crop)
        mask = mask and _cropped(mask, mode, around.picture.size, around.crop)
    if not annotator.needs_mask:
        if own_mask is not None and own_mask.getextrema() != (0, 0):
            raise RequestError(f"{unit.place}.mask is given, but {unit.module} takes none", where)
        mask = None
    values: dict[str, Any] = module_values(
        unit.module, annotator, unit.processor_res, unit.threshold_a, unit.threshold_b
    )
    if unit.pixel_perfect and annotator.resizes:
        values[PROCESSOR_RES.name] = pixel_perfect_resolution(picture.size, around.width, around.height, mode)
    check_working_size(values, picture, around.max_pixels, f"{unit.place}.processor_res")
    return annotate(unit.module, picture, mask, width=around.width, height=around.height, resize_mode=mode, **values)


def _cropped(picture: Image.Image, mode: Fit, size: tuple[int, int], box: Box) -> Image.Image:
    """The part of a control picture that lies over ``box`` of a picture of ``size``."""
    laid = picture if picture.size == size else fit(picture, *size, mode)
    return laid.crop(box)


def _own_pictures(unit: Unit, reader: PictureReader) -> tuple[Image.Image | None, Image.Image | None]:
    """The unit's picture and its mask, however they are given."""
    where, image, mask = f"{unit.place}.image", unit.image, unit.mask
    if isinstance(image, list):
        if len(image) == 2 and not any(isinstance(each, dict) for each in image):
            image = {"image": image[0], "mask": image[1]}
        elif len(image) == 1:
            image = image[0]
        elif image:
            raise RequestError(f"{where} has {len(image)} pictures; a unit takes one", where)
    if isinstance(image, dict):
        mask = image.get("mask") or mask
        image = image.get("image")
    texts = [text or "" for text in (image, mask)]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{where} is not a picture in base64", where)
    picture, read = (reader.decode_text(str(text), where) if text else None for text in texts)
    return picture, read and read.convert("L")


def _checked(unit: Unit, field: str, work: Callable[[], Any]) -> Any:
    """``work``'s result; what is wrong is said of the unit's field."""
    try:
        return work()
    except RequestError:
        raise
    except ModuleNotFoundError as error:
        raise missing_package(error, unit.module, f"{unit.place}.module") from None
    except UserError as error:
        raise RequestError(f"{unit.place}.{field}: {error}", f"{unit.place}.{field}") from None
