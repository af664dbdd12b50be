"""Jobs that are asked for later, and server-sent events."""
# ruff: noqa: E402 - much of it is there with the extra [serve] only

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
httpx = pytest.importorskip("httpx", reason="the client is httpx")

from fastapi import FastAPI

from controlrt.runtime.errors import DrawingError
from controlrt.runtime.server import events
from fake_service import FakeService, fake_pictures

pytestmark = pytest.mark.anyio


def parsed(text: str) -> list[tuple[str, Any]]:
    """Names and data of events, read as the standard says."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


async def submitted(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/generate", json={"prompt": "a", "wait": False, **body})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["Location"] == job["url"]
    return job


async def finished(client: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    while (found := (await client.get(job["url"])).json())["status"] in ("queued", "running"):
        await asyncio.sleep(0.001)
    return found


async def test_a_job_is_fetched_later(client: httpx.AsyncClient, app: FastAPI, service: FakeService) -> None:
    job = await submitted(client, seed=3, response="webp", previews=True)
    assert (job["status"], job["result"]) == ("queued", None)
    assert list(app.state.uncollected) == [service.jobs[job["id"]]]
    done = await finished(client, job)
    assert (done["status"], done["step"], done["steps"]) == ("done", 4, 4)
    assert done["result"]["media_type"] == "image/webp"
    assert Image.open(io.BytesIO(base64.b64decode(done["result"]["images"][0]))).format == "WEBP"
    assert Image.open(io.BytesIO(base64.b64decode(done["previews"][0]))).format == "JPEG"
    assert not list(app.state.uncollected)


async def test_a_job_says_why_it_failed(client: httpx.AsyncClient, service: FakeService) -> None:
    service.failure = DrawingError("broken twice")
    done = await finished(client, await submitted(client))
    assert (done["status"], done["error"]["code"], done["error"]["message"]) == (
        "failed",
        "drawing_failed",
        "broken twice",
    )


async def test_a_job_can_be_cancelled(client: httpx.AsyncClient, service: FakeService) -> None:
    service.step_seconds = 5
    job = await submitted(client)
    assert (await client.delete(job["url"])).status_code == 200
    done = await finished(client, job)
    assert (done["status"], done["error"]["code"]) == ("cancelled", "cancelled")
    assert (await client.delete(job["url"])).json()["status"] == "cancelled"


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/events")])
async def test_an_unknown_job_is_not_found(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, f"/v1/jobs/nobody{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_a_format_that_is_none(client: httpx.AsyncClient) -> None:
    job = await submitted(client)
    response = await client.get(f"/v1/jobs/{job['id']}?response=tiff")
    assert response.status_code == 422
    assert response.json()["error"]["parameter"] == "response"


async def test_a_stream_says_steps_previews_and_result(client: httpx.AsyncClient, service: FakeService) -> None:
    service.held = True
    asyncio.get_running_loop().call_later(0.1, setattr, service, "held", False)
    body = {"prompt": "a", "seed": 3, "stream": True, "previews": True, "num_images_per_prompt": 2}
    response = await client.post("/v1/generate", json=body)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    said = parsed(response.text)
    names = [name for name, _ in said]
    steps = [data["step"] for name, data in said if name == "progress"]
    assert names == ["job", *["progress"] * len(steps), "result"]
    assert (steps[0], steps[-1]) == (0, 4)
    assert steps == sorted(set(steps))  # some are missed where the client is slow
    [identity] = service.jobs
    assert said[0][1]["id"] == said[-1][1]["id"] == identity
    assert {data["steps"] for name, data in said if name == "progress"} == {4}
    for text in said[1][1]["previews"]:
        preview = Image.open(io.BytesIO(base64.b64decode(text)))
        assert (preview.format, preview.size) == ("JPEG", (8, 8))
    for text, drawn in zip(said[-1][1]["images"], fake_pictures(3, 2), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))), drawn)


async def test_a_stream_ends_with_the_error(client: httpx.AsyncClient, service: FakeService) -> None:
    service.failure = DrawingError("broken twice")
    response = await client.post("/v1/generate", json={"prompt": "a", "stream": True})
    name, data = parsed(response.text)[-1]
    assert (name, data["error"]["code"]) == ("error", "drawing_failed")
    assert data["error"]["request_id"] == response.headers["X-Request-ID"]


async def test_watching_a_job_ends_with_its_result(client: httpx.AsyncClient, app: FastAPI) -> None:
    job = await submitted(client, seed=3)
    for _ in range(2):  # also when it is long over
        said = parsed((await client.get(f"/v1/jobs/{job['id']}/events?response=jpeg")).text)
        assert (said[0][0], said[-1][0], said[-1][1]["media_type"]) == ("job", "result", "image/jpeg")
    assert not list(app.state.uncollected)


async def test_watchers_may_go_away(client: httpx.AsyncClient, service: FakeService) -> None:
    service.held = True
    job = await submitted(client)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.get(f"/v1/jobs/{job['id']}/events"), 0.05)
    service.held = False
    assert (await finished(client, job))["status"] == "done"


async def test_a_quiet_stream_is_kept_alive(
    client: httpx.AsyncClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_SECONDS", 0.01)
    service.held = True
    asyncio.get_running_loop().call_later(0.1, setattr, service, "held", False)
    response = await client.post("/v1/generate", json={"prompt": "a", "stream": True})
    assert events.KEEP_ALIVE in response.text
    assert parsed(response.text)[-1][0] == "result"


async def test_bundles_say_what_can_be_asked(client: httpx.AsyncClient) -> None:
    first, second = (await client.get("/v1/bundles")).json()
    assert first["name"] == "fake"
    assert [each["name"] for each in first["controls"]] == ["canny", "depth"]
    assert (first["sizes"], first["default_size"]) == (["64x64", "128x64"], "64x64")
    assert (second["name"], second["controls"]) == ("plain", [])
