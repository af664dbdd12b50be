"""The routes of the web UI's ControlNet extension: its lists, and annotators by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from controlrt.runtime.annotators import ANNOTATORS, Annotator, annotate, annotator_named_in
from controlrt.runtime.annotators.annotator import PROCESSOR_RES
from controlrt.runtime.errors import RequestError, UserError
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.server.automatic1111.options import Options
from controlrt.runtime.server.automatic1111.units import (
    PROCESSOR_RESOLUTION,
    THRESHOLDS,
    check_working_size,
    control_title,
    find_module,
    missing_package,
    module_values,
    shown,
)
from controlrt.runtime.server.jobs import Service
from controlrt.runtime.server.pictures_io import PictureReader, encode_base64
from controlrt.runtime.server.settings import Settings

VERSION = 3
"""Of the extension's interface."""
UNITS = 10
"""As many as its settings allow; here it is one for each control."""
CONTROL_TYPES: dict[str, tuple[str, ...]] = {
    "Canny": ("canny",),
    "SoftEdge": ("softedge",),
    "Scribble": ("scribble", "scribble_xdog"),
    "Lineart": ("lineart_xdog", "lineart_standard"),
    "MLSD": ("straight_lines",),
    "NormalMap": ("normal_map",),
    "Tile": ("tile_resample", "blur_gaussian"),
    "T2I-Adapter": ("t2ia_color_grid",),
    "Shuffle": ("shuffle",),
    "Inpaint": ("inpaint",),
}
"""The extension's types of control, and our annotators that make their pictures, the default first."""


class Detect(BaseModel):
    """What ``detect`` is asked."""

    model_config = ConfigDict(extra="forbid")

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = Field(default_factory=list)
    controlnet_images: list[str] = Field(default_factory=list)
    """Another name of it, which webuiapi has."""
    controlnet_processor_res: float = -1
    controlnet_threshold_a: float = -1
    controlnet_threshold_b: float = -1
    controlnet_masks: list[str] = Field(default_factory=list)
    low_vram: bool = False


def router(service: Service, settings: Settings, options: Callable[[], Options]) -> APIRouter:
    """The routes ``/controlnet/...``."""
    routes = APIRouter(prefix="/controlnet")

    def manifest() -> Manifest:
        return service.bundles[options().bundle]

    @routes.get("/version")
    async def version() -> dict[str, int]:
        return {"version": VERSION}

    @routes.get("/settings")
    async def unit_count() -> dict[str, int]:
        return {"control_net_unit_count": UNITS}

    @routes.get("/model_list")
    async def model_list() -> dict[str, list[str]]:
        """The controls of the bundle that is set."""
        return {"model_list": [control_title(control, manifest()) for control in manifest().controls]}

    @routes.get("/module_list")
    async def module_list() -> dict[str, Any]:
        """The annotators by all their names, those of networks that a filter stands in for among them."""
        names = {name: annotator for annotator in ANNOTATORS.values() for name in annotator.names}
        details = {name: {"model_free": True, "sliders": _sliders(name, each)} for name, each in names.items()}
        return {"module_list": list(names), "module_detail": details}

    @routes.get("/control_types")
    async def control_types() -> dict[str, Any]:
        """Modules and models that go together."""
        return {"control_types": _control_types(manifest())}

    @routes.post("/detect")
    async def detect(request: Detect) -> dict[str, Any]:
        """What an annotator makes of pictures."""
        return {"images": await asyncio.to_thread(_detect, request, settings), "info": "Success"}

    return routes


def _detect(request: Detect, settings: Settings) -> list[str]:
    where = "controlnet_module"
    annotator = find_module(request.controlnet_module, where)
    images = request.controlnet_input_images or request.controlnet_images
    if not images:
        raise RequestError("controlnet_input_images has no picture", "controlnet_input_images")
    masks = request.controlnet_masks
    if annotator.needs_mask and len(masks) != len(images):
        raise RequestError(
            f"controlnet_masks has {len(masks)} pictures, but {request.controlnet_module} needs {len(images)}, "
            "one for each picture",
            "controlnet_masks",
        )
    if masks and not annotator.needs_mask:
        raise RequestError(
            f"controlnet_masks are given, but {request.controlnet_module} takes none", "controlnet_masks"
        )
    values: dict[str, Any] = module_values(
        request.controlnet_module,
        annotator,
        request.controlnet_processor_res,
        request.controlnet_threshold_a,
        request.controlnet_threshold_b,
    )
    reader = PictureReader(settings.max_pixels)
    made = []
    for index, text in enumerate(images):
        picture = reader.decode_text(text, "controlnet_input_images")
        mask = reader.decode_text(masks[index], "controlnet_masks") if masks else None
        check_working_size(values, picture, settings.max_pixels, "controlnet_processor_res")
        try:
            made.append(encode_base64(shown(annotate(request.controlnet_module, picture, mask, **values))))
        except ModuleNotFoundError as error:
            raise missing_package(error, request.controlnet_module, where) from None
        except UserError as error:
            raise RequestError(f"{where}: {error}", where) from None
    return made


def _control_types(manifest: Manifest) -> dict[str, Any]:
    models = {
        control_title(control, manifest): annotator_named_in(control.name, control.source)
        for control in manifest.controls
    }
    everything = {
        "module_list": list(ANNOTATORS),
        "model_list": ["None", *models],
        "default_option": "none",
        "default_model": "None",
    }
    types: dict[str, Any] = {"All": everything}
    for kind, modules in CONTROL_TYPES.items():
        fitting = [model for model, annotator in models.items() if annotator in modules]
        types[kind] = {
            "module_list": ["none", *modules],
            "model_list": ["None", *fitting],
            "default_option": modules[0],
            "default_model": fitting[0] if fitting else "None",
        }
    return types


def _sliders(name: str, annotator: Annotator) -> list[dict[str, Any]]:
    """The parameters of a module, as the extension describes them: the resolution, then the thresholds."""
    sliders: list[dict[str, Any]] = []
    if annotator.resizes:
        sliders.append({"name": "Preprocessor Resolution", "value": PROCESSOR_RESOLUTION, "min": 1, "step": 1})
        sliders[0]["max"] = PROCESSOR_RES.maximum
    count = 0 if name in annotator.stands_in_for else THRESHOLDS.get(annotator.name, 0)
    for parameter in annotator.parameters:
        if parameter.name in ("threshold_a", "threshold_b")[:count]:
            sliders.append(
                {
                    "name": parameter.label,
                    "value": parameter.default,
                    "min": parameter.minimum,
                    "max": parameter.maximum,
                    "step": 0.01,
                }
            )
    return sliders
