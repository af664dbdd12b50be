"""The client that requests are timed with, on servers of the standard library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from controlrt.perf.server.client import BlockingClient

LARGE = "x" * 1_000_000


class Echo(BaseHTTPRequestHandler):
    """Answers with what was asked, and says how many connections there were; a field of the request says how."""

    protocol_version = "HTTP/1.1"
    connections: ClassVar[set[object]] = set()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.connections.add(self.client_address)
        if asked["how"] == "gone":
            self.close_connection = True
            return
        body = json.dumps({"path": self.path, "asked": asked, "connections": len(self.connections)}).encode()
        self.send_response(503 if asked["how"] == "refused" else 200)
        if asked["how"] == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (body[:10], body[10:]):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            return
        if asked["how"] == "last":
            self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serving() -> Iterator[str]:
    Echo.connections.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("how", "status"), [("whole", 200), ("chunked", 200), ("refused", 503)])
def test_whatever_the_answer_is(how: str, status: int) -> None:
    with serving() as url, BlockingClient(url) as client:
        for prompt in ("short", LARGE, "ä\r\n"):
            body = {"prompt": prompt, "how": how}
            answer = client.generate(body)
            assert answer.status == status
            assert answer.fields() == {"path": "/v1/generate", "asked": body, "connections": 1}
            assert 0 < answer.seconds < 60


@pytest.mark.parametrize(("how", "status"), [("last", 200), ("gone", 0)])
def test_a_connection_that_is_closed_is_opened_anew(how: str, status: int) -> None:
    with serving() as url, BlockingClient(url) as client:
        assert client.generate({"how": how}).status == status
        again = client.generate({"how": "whole"})
        assert again.fields()["connections"] == 2


def test_nobody_there() -> None:
    with serving() as url:
        pass
    with BlockingClient(url) as client:
        answer = client.generate({"how": "whole"})
    assert answer.status == 0
    assert b"refused" in answer.body
