"""What every request passes: keys, limits, ids, log, metrics, probes."""
# ruff: noqa: E402 - much of it is there with the extra [serve] only

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
httpx = pytest.importorskip("httpx", reason="the client is httpx")

from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from controlrt.runtime.errors import UnavailableError
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.metrics import Metrics
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService

pytestmark = pytest.mark.anyio
KEYS = ("first-key", "schlüssel")


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """A value as Prometheus would scrape it."""
    found = [
        each.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for each in family.samples
        if each.name == name and labels.items() <= each.labels.items()
    ]
    return sum(found)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer first-key"}, 200),
        ({"Authorization": "bearer  first-key"}, 200),
        ({"X-API-Key": "first-key"}, 200),
        ({"X-API-Key": "schlüssel".encode()}, 200),
        ({"X-API-Key": "first-ke"}, 401),
        ({"X-API-Key": ""}, 401),
        ({"Authorization": "Basic first-key"}, 401),
        ({"Authorization": "Bearer"}, 401),
    ],
)
@pytest.mark.parametrize("path", ["/v1/bundles", "/metrics"])
async def test_asks_for_a_key(service: FakeService, headers: dict[str, Any], status: int, path: str) -> None:
    async with client_of(build_app(service, Settings(api_keys=KEYS))) as client:
        response = await client.get(path, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "unauthorized"
        assert response.json()["error"]["request_id"] == response.headers["X-Request-ID"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
async def test_probes_and_documentation_are_open(service: FakeService, path: str) -> None:
    async with client_of(build_app(service, Settings(api_keys=KEYS))) as client:
        assert (await client.get(path)).status_code == 200


async def test_nobody_without_a_key_has_a_body_read(service: FakeService) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"{}"

    async with client_of(build_app(service, Settings(api_keys=KEYS))) as client:
        response = await client.post("/v1/generate", content=body(), headers={"Content-Type": "application/json"})
    assert (response.status_code, read) == (401, 0)


async def test_a_large_body_is_refused_unread(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/generate", content=b"x" * 200_001, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
    assert "200,000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
async def test_a_large_body_is_refused_while_it_is_read(client: httpx.AsyncClient, kind: str) -> None:
    """One that does not say how long it is."""
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        yield b'--b\r\nContent-Disposition: form-data; name="init_image"; filename="x"\r\n\r\n'
        for _ in range(100):
            read += 10_000
            yield b"x" * 10_000

    response = await client.post("/v1/generate", content=body(), headers={"Content-Type": kind})
    assert response.status_code == 413
    assert read <= 220_000


async def test_a_length_that_is_no_number_of_this_world(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/generate", content=b"{}", headers={"Content-Length": "9" * 5000})
    assert response.status_code == 413


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3:4", True), ("a b", False), ("ä", False), ("x" * 129, False)])
async def test_a_request_keeps_its_id(client: httpx.AsyncClient, given: str, kept: bool) -> None:
    response = await client.get("/healthz", headers={"X-Request-ID": given.encode()})
    assert (response.headers["X-Request-ID"] == given) == kept
    assert re.fullmatch(r"[\w.:-]+", response.headers["X-Request-ID"])


async def test_the_log_has_a_line_for_every_request(
    client: httpx.AsyncClient, service: FakeService, log_lines: list[dict[str, Any]]
) -> None:
    body = {"prompt": "a secret", "model": "plain"}
    await client.post("/v1/generate", json=body, headers={"X-Request-ID": "mine"})
    await client.post("/v1/generate", json={"prompt": "a secret", "secret": 1})
    first, second = log_lines
    assert first.pop("seconds") > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "level": "info",
        "event": "request",
        "request_id": "mine",
        "method": "POST",
        "path": "/v1/generate",
        "status": 200,
        "client": "127.0.0.1",
        "job": next(iter(service.jobs)),
        "model": "plain",
        "queued": 0.0,
    }
    assert (second["status"], second["code"]) == (422, "invalid_request")
    assert "a secret" not in str(log_lines)


async def test_what_nobody_expects_is_in_the_log_and_not_in_the_answer(
    app: FastAPI, service: FakeService, log_lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError(f"a secret of {name}")

    monkeypatch.setattr(service, "job", broken)
    async with client_of(app) as client:
        response = await client.get("/v1/jobs/x", headers={"X-Request-ID": "mine"})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "code": "internal",
        "message": "an unexpected error; the server's log says more",
        "parameter": None,
        "request_id": "mine",
    }
    assert response.headers["X-Request-ID"] == "mine"
    error, request = log_lines
    assert (error["level"], error["request_id"], request["status"]) == ("error", "mine", 500)
    assert "ZeroDivisionError: a secret of x" in error["exception"]


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [("starting", 200, 503), ("ready", 200, 200), ("draining", 200, 503), ("failed", 503, 503)],
)
async def test_probes(client: httpx.AsyncClient, service: FakeService, state: Any, health: int, ready: int) -> None:
    service.state = state
    for path, status in (("/healthz", health), ("/readyz", ready)):
        response = await client.get(path)
        assert (response.status_code, response.json()) == (status, {"status": state})


async def test_errors_of_the_router_have_the_same_shape(client: httpx.AsyncClient) -> None:
    for method, path, status, code in (
        ("GET", "/nowhere", 404, "not_found"),
        ("PUT", "/v1/generate", 405, "method_not_allowed"),
    ):
        response = await client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_metrics_count_requests_rejections_and_what_the_service_says(service: FakeService) -> None:
    metrics = Metrics()
    async with client_of(build_app(service, Settings(max_steps=60), metrics)) as client:
        await client.post("/v1/generate", json={"prompt": "a", "stream": True, "previews": True})
        await client.post("/v1/generate", json={"prompt": "a", "x": 1})
        service.refusal = UnavailableError("full", "queue_full", 1)
        await client.post("/v1/generate", json={"prompt": "a"})
        await client.get("/v1/jobs/a")
        await client.get("/v1/jobs/b")
        await client.get("/somewhere")
        metrics.queued("fake", 3)
        metrics.stepped("fake", 2, 0.03)
        metrics.restarted("fake")
        scraped = await client.get("/metrics")
    assert scraped.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    generate = {"method": "POST", "route": "/v1/generate"}
    assert sample(metrics, "controlrt_request_seconds_count", **generate, status="200") == 1
    assert sample(metrics, "controlrt_request_seconds_count", route="/v1/jobs/{job_id}", status="404") == 2
    assert sample(metrics, "controlrt_request_seconds_count", route="unknown", status="404") == 1
    assert sample(metrics, "controlrt_rejections_total", reason="invalid_request") == 1
    assert sample(metrics, "controlrt_rejections_total", reason="queue_full") == 1
    assert sample(metrics, "controlrt_first_preview_seconds_count", model="fake") == 1
    assert sample(metrics, "controlrt_queue_length", model="fake") == 3
    assert sample(metrics, "controlrt_step_seconds_sum", model="fake") == 0.03
    assert sample(metrics, "controlrt_batch_pictures_sum", model="fake") == 2
    assert sample(metrics, "controlrt_worker_restarts_total", model="fake") == 1


def test_two_servers_measure_apart() -> None:
    first, second = Metrics(), Metrics()
    first.rejected("queue_full")
    assert sample(second, "controlrt_rejections_total") == 0


def test_the_log_can_be_configured_twice() -> None:
    from controlrt.runtime.server.log import configure_log

    names = ("controlrt", "uvicorn")
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}
    try:
        configure_log()
        configure_log()
        assert [len(logging.getLogger(name).handlers) for name in names] == [1, 1]
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
