"""Clients of the server's native interface: one answer at a time, with the moment it was there."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httptools
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

GENERATE = "/v1/generate"
_TIMEOUT = 600.0
_CHUNK = 2**18
_KEEP_ALIVE = 4.0
"""Seconds that a connection may lie idle: servers close it after five."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    """Of HTTP; 0 where the connection ended without an answer."""
    sent: float
    """On ``time.perf_counter``."""
    received: float
    """When all of it was there."""
    body: bytes

    @property
    def seconds(self) -> float:
        """From request to the end of the answer."""
        return self.received - self.sent

    def fields(self) -> dict[str, Any]:
        """The body as JSON; empty where it is none."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def picture(self) -> NDArray[np.uint8]:
        """The one that was drawn, (height, width, 3)."""
        return decode_picture(self.fields()["images"][0])


def decode_picture(text: str) -> NDArray[np.uint8]:
    """A picture's file in base64 as (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


class Client:
    """Connections to one server, any number at once. A context manager.

    Args:
        url: ``http://127.0.0.1:8000``.
        timeout: seconds that an answer may take.
    """

    def __init__(self, url: str, timeout: float = _TIMEOUT) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def generate(self, body: dict[str, Any]) -> Answer:
        """Asks for pictures and waits for the answer, whatever it is."""
        return await self.send("POST", GENERATE, json.dumps(body).encode())

    async def send(self, method: str, path: str, content: bytes = b"") -> Answer:
        """Any request with JSON as its body, or what claims to be."""
        headers = {"Content-Type": "application/json"} if content else {}
        sent = time.perf_counter()
        try:
            answer = await self._http.request(method, path, content=content, headers=headers)
        except httpx.TransportError as error:
            return Answer(status=0, sent=sent, received=time.perf_counter(), body=repr(error).encode())
        return Answer(status=answer.status_code, sent=sent, received=time.perf_counter(), body=answer.content)


class BlockingClient:
    """One connection, for one request at a time: a socket and httptools' parser, which take 0.3 ms less of their own
    than http.client. A context manager.

    Args:
        url: ``http://127.0.0.1:8000``.
        timeout: seconds that an answer may be silent.
    """

    def __init__(self, url: str, timeout: float = _TIMEOUT) -> None:
        self._server, self._timeout = urlsplit(url), timeout
        self._socket: socket.socket | None = None
        self._used = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def generate(self, body: dict[str, Any]) -> Answer:
        """Asks for pictures and waits for the answer, whatever it is."""
        content = json.dumps(body).encode()
        fields = [
            f"POST {GENERATE} HTTP/1.1",
            f"Host: {self._server.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
        ]
        request = "\r\n".join([*fields, "", ""]).encode() + content
        heard = _Heard()
        sent = time.perf_counter()
        try:
            connection = self._connected()
            sent = time.perf_counter()
            connection.sendall(request)
            while not heard.complete:
                if not (data := connection.recv(_CHUNK)):
                    raise ConnectionResetError("the server has closed the connection")
                heard.parser.feed_data(data)
        except (OSError, httptools.HttpParserError) as error:
            self._close()
            return Answer(status=0, sent=sent, received=time.perf_counter(), body=repr(error).encode())
        received = time.perf_counter()
        self._used = time.monotonic()
        if not heard.stays_open:
            self._close()
        return Answer(status=heard.parser.get_status_code(), sent=sent, received=received, body=b"".join(heard.parts))

    def _connected(self) -> socket.socket:
        if time.monotonic() - self._used > _KEEP_ALIVE:
            self._close()
        if self._socket is None:
            self._socket = socket.create_connection((self._server.hostname, self._server.port or 80), self._timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class _Heard:
    """What httptools has read of an answer."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.parts: list[bytes] = []
        self.complete = self.stays_open = False

    def on_headers_complete(self) -> None:
        self.stays_open = self.parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_message_complete(self) -> None:
        self.complete = True
