"""The interface of AUTOMATIC1111's web UI and its ControlNet extension, for clients that speak it.

What a field means is the web UI's; what is not supported is refused by name, and control is never left out silently.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse

from controlrt.runtime.server.automatic1111 import controlnet, listing
from controlrt.runtime.server.automatic1111.answers import answer
from controlrt.runtime.server.automatic1111.calls import Calls, progress
from controlrt.runtime.server.automatic1111.drawings import read_drawing
from controlrt.runtime.server.automatic1111.fields import Img2Img, Txt2Img
from controlrt.runtime.server.automatic1111.options import Options
from controlrt.runtime.server.jobs import Service
from controlrt.runtime.server.settings import Settings


class _Interface:
    """What the routes share: the settings that clients change, and the calls on their way."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service, self.settings = service, settings
        self.calls = Calls(service)
        self._options: Options | None = None

    @property
    def options(self) -> Options:
        """What is set."""
        if self._options is None:
            self._options = Options(bundle=next(iter(self.service.bundles)))
        return self._options

    def set(self, values: dict[str, Any]) -> None:
        """Changes settings for all calls from now on."""
        self._options = self.options.changed(values, self.service.bundles)

    async def draw(self, request: Request, call: Txt2Img | Img2Img) -> JSONResponse:
        """Draws one call."""
        bundles = self.service.bundles
        drawing = await asyncio.to_thread(read_drawing, call, self.options, bundles, self.settings)
        if not call.override_settings_restore_afterwards:
            self.set(call.override_settings)
        drawn = await self.calls.draw(request, drawing, call.force_task_id)
        body = await asyncio.to_thread(answer, call, drawing, drawn, bundles[drawing.bundle])
        return JSONResponse(body)


def router(service: Service, settings: Settings) -> APIRouter:
    """The routes ``/sdapi/v1/...`` and ``/controlnet/...``.

    Args:
        service: draws.
        settings: the server's limits.
    """
    interface = _Interface(service, settings)
    routes = APIRouter(tags=["AUTOMATIC1111"])
    webui = APIRouter(prefix="/sdapi/v1")

    @webui.post("/txt2img")
    async def txt2img(request: Request, call: Txt2Img) -> JSONResponse:
        """Text to image, with hires fix."""
        return await interface.draw(request, call)

    @webui.post("/img2img")
    async def img2img(request: Request, call: Img2Img) -> JSONResponse:
        """Picture to picture and inpainting."""
        return await interface.draw(request, call)

    @webui.get("/progress")
    async def get_progress(skip_current_image: bool = False) -> dict[str, Any]:
        """How far the oldest call is that is not finished."""
        return await progress(interface.calls.current, with_picture=not skip_current_image)

    @webui.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        """Ends that call: it answers with the pictures that it has."""
        if interface.calls.current is not None:
            interface.calls.current.interrupt()
        return {}

    @webui.post("/skip")
    async def skip() -> None:
        """Ends the iteration of that call which is drawn now."""
        if interface.calls.current is not None:
            interface.calls.current.skip()

    @webui.get("/options")
    async def get_options() -> dict[str, Any]:
        """What is set."""
        return interface.options.shown(service.bundles)

    @webui.post("/options")
    async def set_options(values: Annotated[dict[str, Any], Body()]) -> None:
        """Sets it, for all clients; the checkpoint is a bundle."""
        interface.set(values)

    listing.add_routes(webui, service, lambda: interface.options)
    routes.include_router(webui)
    routes.include_router(controlnet.router(service, settings, lambda: interface.options))
    return routes
