"""What the web UI's answers say of the pictures: the line of parameters in each, and the JSON beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from controlrt.runtime.manifest import Manifest
from controlrt.runtime.server.automatic1111.drawings import Drawing
from controlrt.runtime.server.automatic1111.fields import Call, Img2Img
from controlrt.runtime.server.automatic1111.options import FORMATS, short_hash
from controlrt.runtime.server.jobs import Pixels
from controlrt.runtime.server.pictures_io import encode_base64

Drawn = Sequence[tuple[int, tuple[Pixels, ...]]]
"""The pictures of each iteration that was not skipped."""


def answer(call: Call, drawing: Drawing, drawn: Drawn, manifest: Manifest) -> dict[str, Any]:
    """The body of ``txt2img`` and ``img2img``. Encodes pictures, so it is work for a thread.

    ``images`` are those drawn, then the control pictures; ``parameters`` the request; ``info`` JSON as text.
    """
    images: list[str] = []
    seeds: list[int] = []
    texts: list[str] = []
    encoding = FORMATS[drawing.options.samples_format]
    for index, pictures in drawn:
        for place, (pixels, seed) in enumerate(zip(pictures, drawing.iterations[index].seeds, strict=True)):
            seeds.append(seed)
            texts.append(infotext(call, drawing, seed, manifest))
            if not call.send_images:
                continue
            picture = Image.fromarray(pixels)
            if drawing.repaintings:
                picture = drawing.repaintings[place % len(drawing.repaintings)].finish(picture)
            images.append(encode_base64(picture, encoding, {"parameters": texts[-1]}))
    if call.send_images and drawn:
        images += [encode_base64(each, encoding) for each in drawing.detected]
    return {
        "images": images,
        "parameters": _parameters(call),
        "info": json.dumps(_info(call, drawing, seeds, texts, manifest)),
    }


def infotext(call: Call, drawing: Drawing, seed: int, manifest: Manifest) -> str:
    """The prompts and one line of parameters, as the web UI writes them into its pictures."""
    units = {
        f"ControlNet {index}": (
            f"Module: {unit.module}, Model: {unit.model}, Weight: {unit.weight:g}, Resize Mode: {unit.resize_mode}, "
            f"Guidance Start: {unit.guidance_start:g}, Guidance End: {unit.guidance_end:g}, "
            f"Control Mode: {unit.control_mode}"
        )
        for index, unit in enumerate(drawing.units)
    }
    said = {
        "Steps": call.steps,
        "Sampler": drawing.sampling.sampler,
        "Schedule type": drawing.sampling.schedule,
        "CFG scale": call.cfg_scale,
        "Seed": seed,
        "Size": f"{call.width}x{call.height}",
        "Model hash": short_hash(manifest),
        "Model": drawing.bundle,
        "Clip skip": drawing.options.last_layers if drawing.options.last_layers > 1 else None,
        "RNG": "CPU" if drawing.options.noise == "cpu" else None,
        **(drawing.extra or {}),
        **units,
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in said.items() if value is not None)
    negative = f"\nNegative prompt: {call.negative_prompt}" if call.negative_prompt else ""
    return f"{call.prompt}{negative}\n{line}".strip()


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(",\n:") & set(text) else text


def _parameters(call: Call) -> dict[str, Any]:
    """The request, as it was understood; pictures only where they are asked for."""
    said = call.model_dump()
    if isinstance(call, Img2Img) and not call.include_init_images:
        said |= {"init_images": None, "mask": None}
    return said


def _info(call: Call, drawing: Drawing, seeds: list[int], texts: list[str], manifest: Manifest) -> dict[str, Any]:
    pictures = len(seeds)
    first = seeds[0] if seeds else drawing.iterations[0].seeds[0]
    subseed = (call.model_extra or {}).get("subseed", -1)
    return {
        "prompt": call.prompt,
        "all_prompts": [call.prompt] * pictures,
        "negative_prompt": call.negative_prompt,
        "all_negative_prompts": [call.negative_prompt] * pictures,
        "seed": first,
        "all_seeds": seeds,
        "subseed": subseed,
        "all_subseeds": [subseed] * pictures,
        "subseed_strength": 0,
        "width": call.width,
        "height": call.height,
        "sampler_name": drawing.sampling.sampler,
        "cfg_scale": call.cfg_scale,
        "steps": call.steps,
        "batch_size": call.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": drawing.bundle,
        "sd_model_hash": short_hash(manifest),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": (drawing.extra or {}).get("Denoising strength"),
        "extra_generation_params": {"Schedule type": drawing.sampling.schedule, **(drawing.extra or {})},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": drawing.options.last_layers,
        "is_using_inpainting_conditioning": False,
        "comments": list(drawing.comments),
    }
