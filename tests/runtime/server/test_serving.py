"""A server as a process: signals, draining, clients that go away."""
# ruff: noqa: E402 - much of it is there with the extra [serve] only

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
httpx = pytest.importorskip("httpx", reason="the client is httpx")

from controlrt.runtime.errors import UserError
from controlrt.runtime.server.serving import open_socket

TESTS = Path(__file__).parents[2]
SERVER = """
import asyncio, signal, sys
from controlrt.runtime.commands import guarded
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.log import configure_log
from controlrt.runtime.server.serving import open_socket, serve
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService

class Telling(FakeService):
    async def submit(self, request):
        job = await super().submit(request)
        print("accepted", flush=True)
        return job

async def main():
    service = Telling()
    service.held = True
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: setattr(service, "held", False))
    configure_log()
    with open_socket("127.0.0.1", 0) as bound:
        bound.listen()  # or a client could come too soon
        print(bound.getsockname()[1], flush=True)
        try:
            await serve(build_app(service, Settings()), service, bound)
        finally:
            print(*(job.status for job in service.jobs.values()), flush=True)

def run():
    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    return 0

sys.exit(guarded(run, []))
"""
"""It draws nothing before SIGUSR1."""


class Server:
    """A process with a fake service."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(TESTS), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self.port = int(self.process.stdout.readline())

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Asks on a connection of its own."""
        return httpx.request(method, f"http://127.0.0.1:{self.port}{path}", timeout=60, **options)

    def post(self, **body: Any) -> httpx.Response:
        """Draws."""
        return self.request("POST", "/v1/generate", json={"prompt": "a", **body})

    def wait_until_accepted(self) -> None:
        """Returns when the service has one request more."""
        assert self.process.stdout.readline() == "accepted\n"

    def wait_for_log(self, event: str, **fields: Any) -> dict[str, Any]:
        """The log's next line of that event with these fields."""
        for line in self.process.stderr:
            found = json.loads(line)
            if {"event": event, **fields}.items() <= found.items():
                return found
        raise AssertionError(f"no {event}")

    def result(self) -> tuple[int, list[str]]:
        """Exit status, and what became of its jobs."""
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out.split()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.communicate()


def test_sigterm_drains(server: Server) -> None:
    """What was accepted is answered, waited for or not; what comes later is turned away; the end is a good one."""
    with ThreadPoolExecutor() as threads:
        url = server.post(wait=False).json()["url"]
        waiting = threads.submit(server.post, seed=3)
        streaming = threads.submit(server.post, stream=True)
        for _ in range(3):
            server.wait_until_accepted()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining", signal="SIGTERM")
        assert server.request("GET", "/readyz").status_code == 503
        assert server.request("GET", "/healthz").status_code == 200
        refused = server.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["Retry-After"]) >= 1
        server.process.send_signal(signal.SIGUSR1)
        assert waiting.result().json()["seeds"] == [3]
        assert "event: result" in streaming.result().text
        assert server.request("GET", url).json()["status"] == "done"  # all else is over
    assert server.result() == (0, ["done", "done", "done"])


def test_a_second_interrupt_ends_at_once(server: Server) -> None:
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(server.post)
        server.wait_until_accepted()
        server.process.send_signal(signal.SIGINT)
        server.wait_for_log("draining", signal="SIGINT")
        server.process.send_signal(signal.SIGTERM)  # changes nothing
        assert server.request("GET", "/readyz").status_code == 503
        server.process.send_signal(signal.SIGINT)
        code, [status] = server.result()
        assert (code, status) in ((130, "running"), (130, "cancelled"))
        with contextlib.suppress(httpx.TransportError):
            assert waiting.result().status_code >= 400


def test_a_connection_that_breaks_cancels_its_job(server: Server) -> None:
    for stream in (False, True):
        body = json.dumps({"prompt": "a", "stream": stream})
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"POST /v1/generate HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
            server.wait_until_accepted()
            if stream:
                assert connection.recv(12) == b"HTTP/1.1 200"
        server.wait_for_log("request", status=200 if stream else 499)
    server.process.send_signal(signal.SIGTERM)
    assert server.result() == (0, ["cancelled", "cancelled"])


def test_an_address_that_is_taken() -> None:
    with open_socket("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1 port"):
            open_socket("127.0.0.1", bound.getsockname()[1])
    with pytest.raises(UserError, match="try another --port or --host"):
        open_socket("no.such.host.invalid", 8000)
    with pytest.raises(UserError, match="from 0 to 65535"):
        open_socket("127.0.0.1", 70_000)
