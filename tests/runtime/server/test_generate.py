"""POST /v1/generate: what it takes, what it asks of the service, what it answers."""
# ruff: noqa: E402 - much of it is there with the extra [serve] only

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
httpx = pytest.importorskip("httpx", reason="the client is httpx")

from starlette.types import ASGIApp, Message

from controlrt.runtime.errors import (
    CancelledError,
    ControlRTError,
    DeadlineError,
    DrawingError,
    RequestError,
    UnavailableError,
    UnknownNameError,
)
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.server.pictures_io import encode, encode_base64
from controlrt.runtime.server.schemas import PICTURES, SERVERS_OWN, GenerateRequest
from fake_service import FakeService, fake_pictures

pytestmark = pytest.mark.anyio
PICTURE = fake_pictures(7, 1)[0]
FILE = encode(PICTURE)
TEXT = base64.b64encode(FILE).decode()


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


async def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"code", "message", "parameter", "request_id"}
    assert body["error"]["request_id"] == response.headers["X-Request-ID"]
    return body["error"]


def test_fields_are_those_of_the_pipeline_with_its_defaults() -> None:
    parameters = inspect.signature(ControlNetPipeline.prepare).parameters
    theirs = {name: each.default for name, each in parameters.items() if name not in ("self", "latents")}
    ours = {name: each for name, each in GenerateRequest.model_fields.items() if name not in SERVERS_OWN}
    assert set(ours) == set(theirs)
    for name, default in theirs.items():
        assert ours[name].is_required() if default is inspect.Parameter.empty else ours[name].default == default


async def test_answers_with_pictures_seeds_and_times(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {"prompt": ["a", "b"], "seed": 3, "num_images_per_prompt": 2, "width": 128}
    response = await client.post("/v1/generate", json=body)
    assert response.status_code == 200
    answer = response.json()
    for text, drawn in zip(answer["images"], fake_pictures(3, 4, width=128), strict=True):
        np.testing.assert_array_equal(pixels(text), drawn)
    assert answer["seeds"] == [3]
    assert answer["media_type"] == "image/png"
    assert set(answer["seconds"]) == {"queued", "steps", "decode", "total"}
    assert answer["model"] == "fake"
    assert answer["id"] in service.jobs


async def test_passes_on_what_was_said_and_nothing_else(client: httpx.AsyncClient, service: FakeService) -> None:
    said = {
        "prompt": "a",
        "negative_prompt": "b",
        "prompt_syntax": "webui",
        "num_inference_steps": 9,
        "guidance_scale": 5,
        "controlnet_conditioning_scale": {"canny": [1.0, 0.5], "depth": 0.3},
        "control_guidance_end": [0.5, 1],
        "control_mode": {"canny": "prompt", "depth": 0},
        "control_layer_weights": {"canny": "soft", "depth": None},
        "guess_mode": "original",
        "scheduler": {"_class_name": "UniPCMultistepScheduler", "solver_order": 3},
        "sigmas": None,
        "resize": "crop",
    }
    own = {"model": "fake", "timeout_ms": 2500, "previews": True}
    response = await client.post("/v1/generate", json={**said, **own})
    assert response.status_code == 200, response.text
    [request] = service.requests
    assert request.arguments == said
    assert (request.bundle, request.timeout, request.previews) == ("fake", 2.5, True)


@pytest.mark.parametrize(
    ("fields", "watched"), [({}, False), ({"stream": True}, True), ({"wait": False}, True), ({"previews": True}, True)]
)
async def test_who_looks_at_a_job_before_it_is_finished(
    client: httpx.AsyncClient, service: FakeService, fields: dict[str, bool], *, watched: bool
) -> None:
    assert (await client.post("/v1/generate", json={"prompt": "a", **fields})).is_success
    assert [request.watched for request in service.requests] == [watched]


async def test_pictures_come_as_base64_and_data_urls(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {
        "prompt": "a",
        "image": {"canny": TEXT, "depth": [f"data:image/png;base64,{TEXT}"]},
        "init_image": TEXT,
        "mask_image": [TEXT],
        "control_region": {"canny": TEXT},
    }
    response = await client.post("/v1/generate", json=body)
    assert response.status_code == 200, response.text
    arguments = service.requests[0].arguments
    found = [
        arguments["image"]["canny"],
        arguments["image"]["depth"][0],
        arguments["init_image"],
        arguments["mask_image"][0],
        arguments["control_region"]["canny"],
    ]
    for picture in found:
        np.testing.assert_array_equal(np.asarray(picture), PICTURE)


async def test_a_form_says_the_same_as_json(client: httpx.AsyncClient, service: FakeService) -> None:
    as_json = {
        "prompt": "[not a list",
        "negative_prompt": "5",
        "num_inference_steps": 9,
        "guidance_scale": 5.5,
        "guess_mode": True,
        "seed": [1, 2],
        "num_images_per_prompt": 2,
        "controlnet_conditioning_scale": {"canny": 0.5},
        "scheduler": "UniPC",
        "resize": "crop",
        "image": {"canny": TEXT, "depth": TEXT},
        "init_image": TEXT,
    }
    fields = {
        "prompt": "[not a list",
        "negative_prompt": "5",
        "num_inference_steps": "9",
        "guidance_scale": "5.5",
        "guess_mode": "true",
        "seed": ["1", "2"],
        "num_images_per_prompt": "2",
        "controlnet_conditioning_scale": '{"canny": 0.5}',
        "scheduler": "UniPC",
        "resize": "crop",
    }
    files = dict.fromkeys(("image.canny", "image.depth", "init_image"), ("x.png", FILE, "image/png"))
    assert (await client.post("/v1/generate", json=as_json)).status_code == 200
    response = await client.post("/v1/generate", data=fields, files=files)
    assert response.status_code == 200, response.text

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return np.asarray(value).tolist() if isinstance(value, Image.Image) else value

    first, second = (plain(request.arguments) for request in service.requests)
    assert first == second


async def test_prompts_and_pictures_of_a_form_may_repeat(client: httpx.AsyncClient, service: FakeService) -> None:
    files = [("init_image", ("x.png", FILE)), ("init_image", ("y.png", FILE))]
    response = await client.post("/v1/generate", data={"prompt": ["a", "b"]}, files=files)
    assert response.status_code == 200, response.text
    assert service.requests[0].arguments["prompt"] == ["a", "b"]
    assert len(service.requests[0].arguments["init_image"]) == 2


async def test_a_form_names_every_picture_or_none(client: httpx.AsyncClient) -> None:
    files = {"image": ("x.png", FILE), "image.canny": ("x.png", FILE)}
    response = await client.post("/v1/generate", data={"prompt": "a"}, files=files)
    assert response.status_code == 422
    assert (await error_of(response))["parameter"] == "image"


@pytest.mark.parametrize("encoding", ["png", "jpeg", "webp"])
async def test_answers_with_one_picture_as_it_is(client: httpx.AsyncClient, encoding: str) -> None:
    headers = {"Accept": f"text/html, image/{encoding};q=0.9, */*"}
    response = await client.post("/v1/generate", json={"prompt": "a", "seed": 5}, headers=headers)
    assert response.headers["Content-Type"] == f"image/{encoding}"
    assert response.headers["X-Seed"] == "5"
    picture = Image.open(io.BytesIO(response.content))
    assert (picture.format, picture.size) == (encoding.upper(), (64, 64))


@pytest.mark.parametrize("accept", ["*/*", "application/json, image/png", "text/html"])
async def test_answers_with_json_where_that_is_as_welcome(client: httpx.AsyncClient, accept: str) -> None:
    response = await client.post("/v1/generate", json={"prompt": "a", "response": "jpeg"}, headers={"Accept": accept})
    assert response.json()["media_type"] == "image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(response.json()["images"][0]))).format == "JPEG"


async def test_several_pictures_are_never_one(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {"prompt": ["a", "b"]}
    response = await client.post("/v1/generate", json=body, headers={"Accept": "image/png"})
    assert response.status_code == 422
    assert (await error_of(response))["parameter"] == "Accept"
    assert not service.requests


@pytest.mark.parametrize(
    ("body", "parameter", "says"),
    [
        ({"prompt": "a", "promt": 1, "sed": 2}, "promt", "unknown fields: promt, sed"),
        ({}, "prompt", "Field required"),
        ({"prompt": "a", "seed": "3"}, "seed", "a valid integer or a valid array"),
        ({"prompt": "a", "seed": True}, "seed", "a valid integer"),
        ({"prompt": "a", "image": 3}, "image", "a valid string or a valid array or an object"),
        ({"prompt": "a", "strength": 2}, "strength", "less than or equal to 1"),
        ({"prompt": "a", "latents": [0]}, "latents", "unknown field: latents"),
        ({"prompt": "a", "image": "https://example.org/x.png"}, "image", "fetches nothing"),
        ({"prompt": "a", "image": {"canny": "/etc/passwd"}}, "image.canny", "neither base64"),
        ({"prompt": "a", "image": {"canny": "/etc/hostname"}}, "image.canny", "neither base64"),
        ({"prompt": "a", "image": {"canny": "AAAA"}}, "image.canny", "not a picture"),
        ({"prompt": "a", "init_image": "?"}, "init_image", "neither base64"),
        ({"prompt": "a", "image": {"pose": TEXT}}, "image", "unknown control 'pose'"),
        ({"prompt": "a", "width": 100}, "width", "not a multiple of 64"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": "a", "model": "other"}, "model", "unknown bundle 'other'"),
        ({"prompt": "a", "num_inference_steps": 51}, "num_inference_steps", "at most 50"),
        ({"prompt": "a", "num_inference_steps": None, "sigmas": [1.0] * 51}, "sigmas", "at most 50"),
        ({"prompt": "a", "num_images_per_prompt": 5}, "num_images_per_prompt", "at most 4"),
        ({"prompt": "a" * 10_001}, "prompt", "at most 10000"),
        ({"prompt": "a", "negative_prompt": ["a" * 10_001]}, "negative_prompt", "at most 10000"),
        ({"prompt": "a", "timeout_ms": 600_001}, "timeout_ms", "at most 600000"),
        ({"prompt": "a", "stream": True, "wait": False}, "stream", "/v1/jobs/ID/events"),
        ([], None, "the body must be"),
    ],
)
async def test_refuses_what_cannot_be_drawn(
    client: httpx.AsyncClient, service: FakeService, body: Any, parameter: str | None, says: str
) -> None:
    response = await client.post("/v1/generate", json=body)
    assert response.status_code == 422
    error = await error_of(response)
    assert (error["code"], error["parameter"]) == ("invalid_request", parameter)
    assert says in error["message"]
    assert not service.requests


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
async def test_refuses_numbers_that_are_none(client: httpx.AsyncClient, number: str) -> None:
    response = await client.post(
        "/v1/generate",
        content=f'{{"prompt": "a", "guidance_scale": {number}}}',
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 422
    assert (await error_of(response))["parameter"] == "guidance_scale"


async def test_counts_the_pixels_of_all_pictures_together(client: httpx.AsyncClient) -> None:
    large = encode_base64(np.zeros((256, 512, 3), np.uint8))
    allowed = {"prompt": "a", "image": {"canny": large, "depth": large}}
    assert (await client.post("/v1/generate", json=allowed)).status_code == 200
    response = await client.post("/v1/generate", json={**allowed, "init_image": TEXT})
    assert response.status_code == 422
    assert "262,144 together" in (await error_of(response))["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b'{"prompt":', "application/json", 400, "malformed"),
        (b"", "application/json; charset=utf-8", 400, "malformed"),
        (b"\xff", "application/json", 400, "malformed"),
        (b"nothing", "multipart/form-data", 400, "malformed"),
        (b"nothing", "multipart/form-data; boundary=x", 400, "malformed"),
        (b"prompt=a", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"a", "", 415, "unsupported_media_type"),
    ],
)
async def test_refuses_bodies_that_are_none(
    client: httpx.AsyncClient, content: bytes, kind: str, status: int, code: str
) -> None:
    response = await client.post("/v1/generate", content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    assert (await error_of(response))["code"] == code


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (RequestError("no", "seed"), 422, "invalid_request", None),
        (UnknownNameError("bundle", "x", ["y"]), 422, "invalid_request", None),
        (UnavailableError("full", "queue_full", 2.1), 429, "queue_full", "3"),
        (UnavailableError("ending", "draining", 0), 503, "draining", "1"),
        (UnavailableError("none", "no_worker", 30), 503, "no_worker", "30"),
    ],
)
async def test_says_why_it_does_not_take_a_request(
    client: httpx.AsyncClient,
    service: FakeService,
    error: ControlRTError,
    status: int,
    code: str,
    retry_after: str | None,
) -> None:
    service.refusal = error
    response = await client.post("/v1/generate", json={"prompt": "a"})
    assert response.status_code == status
    assert (await error_of(response))["code"] == code
    assert response.headers.get("Retry-After") == retry_after


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DeadlineError("late"), 504, "deadline"),
        (CancelledError("gone"), 409, "cancelled"),
        (DrawingError("broken twice"), 500, "drawing_failed"),
    ],
)
async def test_says_why_nothing_was_drawn(
    client: httpx.AsyncClient, service: FakeService, error: ControlRTError, status: int, code: str
) -> None:
    service.failure = error
    response = await client.post("/v1/generate", json={"prompt": "a"})
    assert response.status_code == status
    found = await error_of(response)
    assert (found["code"], found["message"]) == (code, str(error))


async def test_is_over_when_its_time_is(client: httpx.AsyncClient, service: FakeService) -> None:
    service.step_seconds = 5
    response = await client.post("/v1/generate", json={"prompt": "a", "timeout_ms": 20})
    assert response.status_code == 504


async def test_another_client_may_cancel(client: httpx.AsyncClient, service: FakeService) -> None:
    service.step_seconds = 5
    waiting = asyncio.create_task(client.post("/v1/generate", json={"prompt": "a"}))
    while not service.jobs:
        await asyncio.sleep(0)
    deleted = await client.delete(f"/v1/jobs/{next(iter(service.jobs))}")
    assert deleted.status_code == 200
    response = await waiting
    assert response.status_code == 409
    assert (await error_of(response))["code"] == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_job(app: ASGIApp, service: FakeService, stream: bool) -> None:
    """Spoken in ASGI, since httpx does not go away in the middle."""
    service.step_seconds = 5
    body = json.dumps({"prompt": "a", "stream": stream}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/generate",
        "raw_path": b"/v1/generate",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("server", 80),
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    started, sent = asyncio.Event(), []

    async def receive() -> Message:
        if messages:
            return messages.pop()
        while not any(job.status == "running" for job in service.jobs.values()):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        started.set()

    await asyncio.wait_for(app(scope, receive, send), 5)
    await asyncio.sleep(0)
    assert [job.status for job in service.jobs.values()] == ["cancelled"]
    assert bool(sent) == stream


def test_pictures_are_the_fields_that_hold_them() -> None:
    properties = GenerateRequest.model_json_schema()["properties"]
    assert [name for name, each in properties.items() if "contentEncoding" in str(each)] == list(PICTURES)
