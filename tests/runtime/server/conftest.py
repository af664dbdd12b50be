"""The web application on a fake service, clients of it, and the two ends of a channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from controlrt.runtime.server.channel import Channel, channel
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Of a channel between two threads."""
    here, there = channel()
    yield here, there
    here.close()
    there.close()


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def settings() -> Settings:
    return Settings(max_body_bytes=200_000, max_pixels=512 * 512, max_steps=50, max_pictures=4)


@pytest.fixture
def app(service: FakeService, settings: Settings) -> FastAPI:
    from controlrt.runtime.server.app import build_app

    return build_app(service, settings)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    import httpx

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        yield client


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the log says, line by line."""
    import json
    import logging

    from controlrt.runtime.server.log import LOGGER, JSONFormatter

    lines: list[dict[str, Any]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JSONFormatter().format(record)))

    monkeypatch.setattr(LOGGER, "handlers", [Kept()])
    LOGGER.setLevel(logging.INFO)
    yield lines
    LOGGER.setLevel(logging.NOTSET)
