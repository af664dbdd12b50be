"""Pipelines as diffusers saves them: a folder with ``model_index.json`` and a folder for each part."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from controlrt.export.checkpoint.architectures import without_values
from controlrt.export.checkpoint.parts import PipelineParts, Reads
from controlrt.export.checkpoint.quiet_loading import loading, loading_options, refuse_incomplete
from controlrt.runtime.errors import SourceError

_PLAIN = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
_XL = {"feature_extractor": None, "image_encoder": None}
PIPELINES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": _PLAIN,
    "StableDiffusionInpaintPipeline": _PLAIN,
    "StableDiffusionXLPipeline": _XL,
    "StableDiffusionXLInpaintPipeline": _XL,
    "LatentConsistencyModelPipeline": _PLAIN,
}
"""Supported pipelines, and the parts of each that are not loaded."""

WEIGHTED_PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


def load_folder(path: Path, reads: Reads = lambda _: True) -> PipelineParts:
    """The parts of a diffusers pipeline; those that ``reads`` leaves out have no values.

    Raises:
        SourceError: no pipeline, one of another kind, or damaged or missing weights.
    """
    import diffusers

    if not (path / "model_index.json").is_file():
        raise SourceError(f"{path} has no model_index.json: it is not a whole pipeline")
    with loading(path):
        index = json.loads((path / "model_index.json").read_text())
        name = index["_class_name"]
    if name not in PIPELINES:
        raise SourceError(f"{path} is a {name}; supported: {', '.join(PIPELINES)}")
    with loading(path):
        parts = {
            part: _load_part(path / part, *index[part], values=reads(part))
            for part in WEIGHTED_PARTS
            if index.get(part, [None])[0]
        }
        options = loading_options(path / "unet")
        pipeline = getattr(diffusers, name).from_pretrained(path, **parts, **PIPELINES[name], **options)
    suffixes = ("", "_2") if getattr(pipeline, "text_encoder_2", None) is not None else ("",)
    return PipelineParts(
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoders=tuple(getattr(pipeline, f"text_encoder{suffix}") for suffix in suffixes),
        tokenizers=tuple(getattr(pipeline, f"tokenizer{suffix}") for suffix in suffixes),
        scheduler=pipeline.scheduler,
        zero_empty_negative=bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
    )


def _load_part(folder: Path, library: str, name: str, *, values: bool) -> Any:
    """One model of a pipeline's folder. By itself a pipeline leaves weights that are missing at random values."""
    if library not in ("diffusers", "transformers"):
        raise SourceError(f"{folder} is a {library}.{name}; supported: classes of diffusers and transformers")
    kind = getattr(importlib.import_module(library), name)
    if not values:
        config = kind.load_config(folder) if library == "diffusers" else kind.config_class.from_pretrained(folder)
        return without_values(kind, config)
    model, info = kind.from_pretrained(folder, output_loading_info=True, **loading_options(folder))
    refuse_incomplete(str(folder), info)
    return model
