"""A client of the web UI's interface upon a service that draws noise."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
import numpy as np
from PIL import Image

import sample_pictures
from controlrt.runtime.manifest import Lora, Manifest
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService, fake_manifest

SMALL = {"width": 64, "height": 64, "steps": 4}
SCENE = Image.fromarray(sample_pictures.scene(64, 64))
LINES = Image.fromarray(np.where(np.arange(64)[:, None, None] % 8 < 2, np.uint8(255), np.zeros((64, 64, 3), np.uint8)))


def as_base64(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def bundle(*controls: str, loras: tuple[Lora, ...] = ()) -> Manifest:
    made = fake_manifest(*controls)
    model = msgspec.structs.replace(made.model, loras=loras)
    profile = ShapeProfile.parse("64x64,128x64,128x128", "1-4")
    return msgspec.structs.replace(made, profile=profile, model=model)


class Client:
    """A client of the web UI's interface upon a fake service; one event loop for both."""

    def __init__(self) -> None:
        self.service = FakeService()
        app = build_app(self.service, Settings(max_pixels=10**6, max_steps=60))
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        self._runner = asyncio.Runner()

    def reset(self) -> None:
        """As it was at the start."""
        self.service.__init__()
        lora = Lora(name="ink", source="ink.safetensors", weight=0.5, sha256="0" * 64)
        self.service.bundles = {"sd15": bundle("canny", "depth", loras=(lora,)), "plain": bundle()}
        self.post("/sdapi/v1/options", {"sd_model_checkpoint": "sd15", "CLIP_stop_at_last_layers": 1})

    def run(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        async def connected() -> Any:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://webui") as client:
                return await work(client)

        return self._runner.run(connected())

    def get(self, path: str) -> Any:
        answer = self.run(lambda client: client.get(path))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        answer = self.run(lambda client: client.post(path, json=body))
        assert answer.status_code == status, answer.text
        return answer.json()

    def txt2img(self, status: int = 200, **fields: Any) -> Any:
        return self.post("/sdapi/v1/txt2img", {**SMALL, "seed": 7, **fields}, status)

    def img2img(self, status: int = 200, **fields: Any) -> Any:
        start = {"init_images": [as_base64(SCENE)], "seed": 7}
        return self.post("/sdapi/v1/img2img", {**SMALL, **start, **fields}, status)

    def arguments(self, index: int = -1) -> dict[str, Any]:
        return dict(self.service.requests[index].arguments)

    def close(self) -> None:
        self._runner.close()


def unit(**fields: Any) -> dict[str, Any]:
    controlnet = {"args": [{"model": "canny", "image": as_base64(LINES), **fields}]}
    return {"alwayson_scripts": {"controlnet": controlnet}}
