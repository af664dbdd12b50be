"""OpenAI's own client, against a real server on a service that draws noise."""
# ruff: noqa: E402 - much of it is there with the extra [serve] only

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")


import sample_pictures
from controlrt.runtime.errors import CancelledError, DrawingError, UnavailableError
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService, fake_pictures
from live_server import serving

SCENE = Image.fromarray(sample_pictures.scene(64, 64))


def as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def as_base64(picture: Image.Image) -> str:
    return base64.b64encode(as_png(picture)).decode()


def pixels(text: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text or ""))))


class Served:
    """A fake service, and a client of it that does not try again."""

    def __init__(self, url: str, service: FakeService) -> None:
        self.url, self.service = url, service
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.service.requests[-1].arguments)


@pytest.fixture(scope="module")
def one_server() -> Iterator[Served]:
    service = FakeService()
    with serving(build_app(service, Settings(max_pixels=10**6, max_steps=60, max_pictures=4))) as url:
        yield Served(url, service)


@pytest.fixture
def api(one_server: Served) -> Iterator[Served]:
    yield one_server
    one_server.service.__init__()


def test_generations(api: Served) -> None:
    made = api.client.images.generate(
        prompt="a cat", n=2, size="64x64", model="fake", response_format="b64_json", quality="auto", user="somebody"
    )
    assert api.arguments == {"prompt": "a cat", "num_images_per_prompt": 2, "width": 64, "height": 64}
    assert api.service.requests[-1].bundle == "fake"
    for each, expected in zip(made.data, fake_pictures(1234, 2), strict=True):
        np.testing.assert_array_equal(pixels(each.b64_json), expected)
    assert (made.size, made.output_format) == ("64x64", "png")
    assert made.seeds == [1234]
    assert abs(made.created - time.time()) < 60


def test_what_the_api_has_no_field_for(api: Served) -> None:
    api.client.images.generate(
        prompt="a",
        size="auto",
        extra_body={
            "negative_prompt": "dog",
            "seed": [7, 8],
            "num_inference_steps": 6,
            "guidance_scale": 5,
            "control_image": {"canny": as_base64(SCENE)},
            "controlnet_conditioning_scale": {"canny": 0.8},
            "control_mode": "prompt",
            "scheduler": "Euler a",
            "clip_skip": 1,
        },
        n=2,
    )
    found = api.arguments
    np.testing.assert_array_equal(np.asarray(found.pop("image")["canny"]), np.asarray(SCENE))
    assert found == {
        "prompt": "a",
        "num_images_per_prompt": 2,
        "negative_prompt": "dog",
        "seed": [7, 8],
        "num_inference_steps": 6,
        "guidance_scale": 5,
        "controlnet_conditioning_scale": {"canny": 0.8},
        "control_mode": "prompt",
        "scheduler": "Euler a",
        "clip_skip": 1,
    }


@pytest.mark.parametrize("chosen", ["png", "jpeg", "webp"])
def test_formats(api: Served, chosen: str) -> None:
    made = api.client.images.generate(prompt="a", output_format=chosen)
    assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).format == chosen.upper()


def test_an_edit_draws_all_of_a_picture_anew(api: Served) -> None:
    made = api.client.images.edit(image=as_png(SCENE), prompt="a", extra_body={"strength": 0.5, "seed": 7})
    found = api.arguments
    np.testing.assert_array_equal(np.asarray(found["init_image"]), np.asarray(SCENE))
    assert (found["strength"], found["seed"], found["width"], found["height"]) == (0.5, 7, 64, 64)
    assert "mask_image" not in found
    np.testing.assert_array_equal(pixels(made.data[0].b64_json), fake_pictures(7, 1)[0])


def test_a_mask_is_transparent_where_the_picture_is_drawn_anew(api: Served) -> None:
    holed = SCENE.copy()
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 32, 64))
    holed.putalpha(alpha)
    for files in ({"image": as_png(SCENE), "mask": as_png(holed)}, {"image": as_png(holed)}):
        api.client.images.edit(prompt="a", size="64x64", n=2, **files)
        found = api.arguments
        np.testing.assert_array_equal(np.asarray(found["mask_image"]), 255 - np.asarray(alpha))
        assert found["num_images_per_prompt"] == 2


def test_an_edit_takes_control_pictures_too(api: Served) -> None:
    api.client.images.edit(
        image=as_png(SCENE),
        prompt="a",
        extra_body={
            "control_image": {"canny": as_base64(SCENE), "depth": as_base64(SCENE)},
            "controlnet_conditioning_scale": {"canny": 0.5, "depth": 1},
            "seed": [7, 8],
            "guess_mode": True,
        },
        n=2,
    )
    found = api.arguments
    assert set(found["image"]) == {"canny", "depth"}
    assert found["controlnet_conditioning_scale"] == {"canny": 0.5, "depth": 1}
    assert (found["seed"], found["guess_mode"]) == ([7, 8], True)


def test_models(api: Served) -> None:
    assert [model.id for model in api.client.models.list()] == ["fake", "plain"]
    assert api.client.models.retrieve("plain").owned_by == "controlrt"
    with pytest.raises(openai.NotFoundError) as caught:
        api.client.models.retrieve("dall-e-3")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        api.client.images.generate(prompt="a", model="dall-e-3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", "url"),
        ("output_format", "svg"),
        ("output_compression", 50),
        ("quality", "hd"),
        ("style", "vivid"),
        ("background", "transparent"),
        ("size", "huge"),
        ("n", 0),
        ("n", 5),
        ("n", "many"),
        ("partial_images", 2),
        ("partial_images", 9),
        ("num_inference_steps", 61),
        ("strength", 2),
        ("control_image", {"canny": "not a picture"}),
        ("control_image", {"missing": as_base64(SCENE)}),
        ("control_image", "https://example.org/a.png"),
        ("init_image", as_base64(SCENE)),
        ("no_such_field", 1),
        ("seed", [1, 2, 3]),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(api: Served, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client.images.generate(prompt="a", extra_body={field: value})
    assert field in f"{caught.value.param} {caught.value.body}"
    assert caught.value.type == "invalid_request_error"
    assert not api.service.requests


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quality", "standard"),
        ("background", "auto"),
        ("moderation", "low"),
        ("style", None),
        ("safety_identifier", "x"),
    ],
)
def test_what_changes_nothing_is_taken(api: Served, field: str, value: Any) -> None:
    api.client.images.generate(prompt="a", extra_body={field: value})


def test_what_an_edit_refuses(api: Served) -> None:
    opaque, two = as_png(SCENE), [("a.png", as_png(SCENE)), ("b.png", as_png(SCENE))]
    for files, named in (
        ({"image": opaque, "mask": opaque}, "mask"),
        ({"image": two}, "image"),
        ({"image": b"not a picture"}, "image"),
        ({"image": as_png(SCENE.resize((40, 40)))}, "width"),
        ({"image": opaque, "size": "100x100"}, "width"),
        ({"image": opaque, "extra_body": {"markup": "x"}}, "markup"),
        ({"image": opaque, "extra_body": {"controlnet_conditioning_scale": "{"}}, "controlnet_conditioning_scale"),
    ):
        with pytest.raises(openai.BadRequestError, match=named):
            api.client.images.edit(prompt="a", **files)
    assert not api.service.requests


def test_bodies_that_are_none(api: Served) -> None:
    post = api.client._client.post
    assert post(f"{api.url}/v1/images/generations", content=b"{").status_code == 400
    assert post(f"{api.url}/v1/images/generations", json={}).json()["error"]["param"] == "prompt"
    answer = post(f"{api.url}/v1/images/edits", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    without = post(f"{api.url}/v1/images/edits", files={"prompt": (None, "a")})
    assert (without.status_code, without.json()["error"]["param"]) == (400, "image")


def test_errors_of_the_service(api: Served) -> None:
    api.service.refusal = UnavailableError("the queue is full", "queue_full", 3)
    with pytest.raises(openai.RateLimitError) as limited:
        api.client.images.generate(prompt="a")
    assert (limited.value.code, limited.value.response.headers["Retry-After"]) == ("queue_full", "3")
    api.service.refusal = None
    for error, kind in (
        (DrawingError("it broke"), openai.InternalServerError),
        (CancelledError("no"), openai.ConflictError),
    ):
        api.service.failure = error
        with pytest.raises(kind, match=str(error)):
            api.client.images.generate(prompt="a")
    assert len(api.service.requests) == 2


def test_a_cancelled_request_is_not_tried_again_by_the_client(api: Served) -> None:
    api.service.failure = CancelledError("no")
    with pytest.raises(openai.ConflictError):
        api.client.with_options(max_retries=2).images.generate(prompt="a")
    assert len(api.service.requests) == 1


def test_streams(api: Served) -> None:
    api.service.step_seconds = 0.1
    events = list(
        api.client.images.generate(
            prompt="a", stream=True, partial_images=2, extra_body={"num_inference_steps": 6, "seed": 7}
        )
    )
    kinds = [each.type.removeprefix("image_generation.") for each in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [each.partial_image_index for each in events[:2]] == [0, 1]
    assert pixels(events[0].b64_json).shape == (64, 64, 3)
    np.testing.assert_array_equal(pixels(events[2].b64_json), fake_pictures(7, 1)[0])
    edited = list(api.client.images.edit(image=as_png(SCENE), prompt="a", stream=True))
    assert [each.type for each in edited] == ["image_edit.completed"]
    api.client.images.generate(prompt="a")
    assert [request.watched for request in api.service.requests] == [True, True, False]


def test_a_stream_says_what_went_wrong(api: Served) -> None:
    api.service.failure = DrawingError("it broke")
    with pytest.raises(openai.APIError, match="it broke"):
        list(api.client.images.generate(prompt="a", stream=True))


def test_a_client_that_goes_away_cancels(api: Served) -> None:
    api.service.step_seconds = 0.1
    with pytest.raises(openai.APITimeoutError):
        api.client.with_options(timeout=2).images.generate(prompt="a", extra_body={"num_inference_steps": 60})
    (job,) = api.service.jobs.values()
    until = time.monotonic() + 5
    while job.status != "cancelled" and time.monotonic() < until:
        time.sleep(0.02)
    assert job.status == "cancelled"
