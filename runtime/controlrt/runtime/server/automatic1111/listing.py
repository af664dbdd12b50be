"""The web UI's lists of what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter

from controlrt.runtime.server.automatic1111.drawings import UPSCALERS
from controlrt.runtime.server.automatic1111.options import Options, short_hash, title
from controlrt.runtime.server.automatic1111.samplers import SAMPLERS, SCHEDULES
from controlrt.runtime.server.jobs import Service

EMPTY = (
    "latent-upscale-modes",
    "sd-vae",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "prompt-styles",
    "script-info",
    "extensions",
)
"""Lists of what is not here."""


def add_routes(routes: APIRouter, service: Service, options: Callable[[], Options]) -> None:
    """Adds the lists to the web UI's routes."""

    @routes.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": one.name, "aliases": one.aliases, "options": {}} for one in SAMPLERS.values()]

    @routes.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        return [
            {"name": one.name, "label": one.label, "aliases": None, "default_rho": -1, "need_inner_model": False}
            for one in SCHEDULES
        ]

    @routes.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        return [
            {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4} for name in UPSCALERS
        ]

    @routes.get("/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        return [
            {
                "title": title(name, manifest),
                "model_name": name,
                "hash": short_hash(manifest),
                "sha256": manifest.key,
                "filename": name,
                "config": None,
            }
            for name, manifest in service.bundles.items()
        ]

    @routes.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """Those that are part of the bundle; a prompt may name them at their weight."""
        return [
            {"name": lora.name, "alias": lora.name, "path": lora.source, "metadata": {"weight": lora.weight}}
            for lora in service.bundles[options().bundle].model.loras
        ]

    @routes.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        return {"loaded": {}, "skipped": {}}

    @routes.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}

    @routes.get("/cmd-flags")
    async def cmd_flags() -> dict[str, Any]:
        return {}

    @routes.get("/memory")
    async def memory() -> dict[str, Any]:
        return {"ram": {}, "cuda": {}}

    for name in ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings"):
        routes.add_api_route(f"/{name}", _nothing, methods=["POST"], summary="Does nothing: lists are always fresh.")
    for name in EMPTY:
        routes.add_api_route(f"/{name}", _none, methods=["GET"], summary="There are none.")


async def _nothing() -> None:
    return None


async def _none() -> list[Any]:
    return []
