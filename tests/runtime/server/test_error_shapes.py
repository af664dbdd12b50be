"""Errors in the shape that each interface's clients know, wherever in the server they come from."""
# ruff: noqa: E402 - much of it is there with the extra [serve] only

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
httpx = pytest.importorskip("httpx", reason="the client is httpx")

from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService

pytestmark = pytest.mark.anyio
NATIVE, OPENAI, WEBUI = "/v1/generate", "/v1/images/generations", "/sdapi/v1/txt2img"


async def answer(path: str, settings: Settings, service: FakeService | None = None, **options: Any) -> httpx.Response:
    app = build_app(service or FakeService(), settings)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return await client.post(path, **options)


def check_shape(path: str, response: httpx.Response, code: str, parameter: str | None = None) -> None:
    body = response.json()
    if path == WEBUI:
        assert body == {"error": code, "detail": body["errors"], "body": "", "errors": body["errors"]}
    elif path == OPENAI:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert (body["error"]["code"], body["error"]["param"]) == (code, parameter)
    else:
        assert set(body["error"]) == {"code", "message", "parameter", "request_id"}
        assert body["error"]["code"] == code


@pytest.mark.parametrize("path", [NATIVE, OPENAI, WEBUI])
async def test_at_the_gate(path: str) -> None:
    without = await answer(path, Settings(api_keys=("secret",)), json={"prompt": "a"})
    assert without.status_code == 401
    check_shape(path, without, "unauthorized")
    large = await answer(path, Settings(max_body_bytes=10), json={"prompt": "a" * 20})
    assert large.status_code == 413
    check_shape(path, large, "too_large")


@pytest.mark.parametrize("path", [NATIVE, OPENAI, WEBUI])
async def test_in_the_body(path: str) -> None:
    wrong = await answer(path, Settings(), json={"prompt": 3})
    assert wrong.status_code == (400 if path == OPENAI else 422)
    check_shape(path, wrong, "invalid_request", "prompt")
    malformed = await answer(path, Settings(), content=b"{", headers={"Content-Type": "application/json"})
    assert malformed.status_code == 400
    check_shape(path, malformed, "malformed")


@pytest.mark.parametrize("path", [NATIVE, OPENAI, WEBUI])
async def test_of_what_nobody_expects(path: str) -> None:
    service = FakeService()
    service.submit = None  # type: ignore[assignment, method-assign]
    broken = await answer(
        path, Settings(), service, json={"prompt": "a", "width": 64, "height": 64} if path == WEBUI else {"prompt": "a"}
    )
    assert broken.status_code == 500
    check_shape(path, broken, "internal")


async def test_a_route_that_is_none() -> None:
    missing = await answer("/sdapi/v1/interrogate", Settings(), json={})
    assert missing.status_code == 404
    check_shape(WEBUI, missing, "not_found")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Basic YW55Ym9keTpzZWNyZXQ="}, 200),  # anybody:secret
        ({"Authorization": "Basic YW55Ym9keTpvdGhlcg=="}, 401),  # anybody:other
        ({"Authorization": "Basic c2VjcmV0"}, 401),  # secret
        ({"Authorization": "Basic ä"}, 401),
    ],
)
async def test_clients_of_the_web_ui_show_a_key_as_a_password(headers: dict[str, str], status: int) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    response = await answer("/sdapi/v1/interrupt", Settings(api_keys=("secret",)), headers=encoded)
    assert response.status_code == status
