"""What the page does when somebody uses it, on a fake service; and its place in the application."""
# ruff: noqa: E402 - the page is there with the extra [ui] only

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

gr = pytest.importorskip("gradio", reason="without the extra [ui] there is no page")
httpx = pytest.importorskip("httpx", reason="the client is httpx")

from starlette.datastructures import URL

from controlrt.runtime.errors import DrawingError, RequestError
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.settings import Settings
from controlrt.runtime.server.ui.control_picture import OFFERED, example_outline
from controlrt.runtime.server.ui.page import NO_CONTROL, PROMPT, Page
from fake_service import FakeService, fake_manifest, fake_pictures

pytestmark = pytest.mark.anyio
REQUEST: Any = SimpleNamespace(session_hash="one", url=URL("http://server:8000/ui/gradio_api/queue/join"))


def new_service() -> FakeService:
    service = FakeService()
    service.bundles = {"shapes": fake_manifest("canny", "mask"), "plain": fake_manifest()}
    return service


@pytest.fixture(scope="module")
def page() -> Page:
    """One for all tests, since laying it out takes a second."""
    return Page(new_service(), Settings(max_steps=50))


@pytest.fixture(autouse=True)
def service(page: Page) -> FakeService:
    """That of the page, as it was in the beginning."""
    vars(page.service).update(vars(new_service()))
    return page.service


def filled_in(page: Page, **changed: Any) -> dict[Any, Any]:
    """What the page's fields hold when it opens, but for those that are changed."""
    given = {each: each.value for each in page.blocks.blocks.values() if hasattr(each, "value")}
    outline = example_outline(64, 64)
    given |= {page.editor: {"background": None, "layers": [outline], "composite": outline}}
    for name, value in changed.items():
        column, _, field = name.rpartition("__")
        given[getattr(getattr(page, column) if column else page, field)] = value
    return given


async def updates(page: Page, **changed: Any) -> list[dict[Any, Any]]:
    return [update async for update in page.on_draw(filled_in(page, **changed), REQUEST)]


def said(update: dict[Any, Any], page: Page) -> str:
    return update[page.message]


async def test_the_first_click_draws(page: Page, service: FakeService) -> None:
    shown = await updates(page)
    [request] = service.requests
    assert request.bundle == "shapes"
    assert request.previews
    assert request.arguments["prompt"] == PROMPT
    control = np.asarray(request.arguments["image"]["mask"])
    assert control.shape == (64, 64, 3)
    assert control[32, 32].tolist() == [255] * 3, "the star is filled"
    last = shown[-1]
    assert "Drawn in" in said(last, page)
    picture = np.asarray(last[page.picture]["value"])
    np.testing.assert_array_equal(picture, fake_pictures(request.arguments["seed"], 1)[0])
    assert [caption for _, caption in last[page.gallery]] == ["seed 7"]
    assert 'ControlNetPipeline.load("shapes")'.replace('"', "'") in last[page.python]
    assert "http://server:8000/v1/generate" in last[page.curl]


async def test_progress_has_previews_of_the_pictures_size(page: Page, service: FakeService) -> None:
    service.step_seconds = 0.05
    shown = await updates(page, first__steps=6)
    steps = [said(update, page) for update in shown if "Step" in update.get(page.message, "")]
    assert len(steps) >= 2
    assert all("of 6." in step for step in steps)
    assert {update[page.picture].size for update in shown[:-1] if page.picture in update} == {(64, 64)}


async def test_two_settings_are_drawn_beside_each_other(page: Page, service: FakeService) -> None:
    shown = await updates(page, compare=True, second__scale=0.25, second__sampler="Euler a", second__seed=9)
    first, second = (request.arguments for request in service.requests)
    assert {name for name in second if second[name] is not first.get(name) and second[name] != first.get(name)} == {
        "controlnet_conditioning_scale",
        "scheduler",
        "seed",
    }
    last = shown[-1]
    assert last[page.picture]["label"] == "scale 1.0, sampler None, seed 7"
    assert last[page.second_picture]["label"] == "scale 0.25, sampler Euler a, seed 9"
    assert len(last[page.gallery]) == len(last[page.history]) == 2


async def test_a_picture_of_the_gallery_shows_its_code(page: Page) -> None:
    last = (await updates(page, compare=True, second__seed=9))[-1]
    event: Any = SimpleNamespace(index=1)
    shown = page.on_select(last[page.history], event, REQUEST)
    assert "seed=9" in shown[page.python]
    assert "seed=9" in shown[page.curl]


async def test_without_control_nothing_needs_to_be_drawn(page: Page, service: FakeService) -> None:
    await updates(page, control=NO_CONTROL, editor=None)
    [request] = service.requests
    assert "image" not in request.arguments


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"editor": None}, "there is no picture yet; draw an outline, or upload a picture"),
        ({"source": "upload"}, "there is no picture yet; draw an outline, or upload a picture"),
        ({"first__seed": None}, "seed is &#x27;empty&#x27;, but must be a number"),
        ({"first__steps": 51}, "num_inference_steps is 51, but this server draws at most 50"),
        ({"size": "96x64"}, "width 96 is not a multiple of 64"),
        ({"size": "large"}, "size is &#x27;large&#x27;, but must be WIDTHxHEIGHT"),
        ({"first__sampler": "Eule"}, "unknown sampler &#x27;Eule&#x27;"),
    ],
)
async def test_what_is_wrong_is_one_line(page: Page, changed: dict[str, Any], says: str) -> None:
    line = said((await updates(page, **changed))[-1], page)
    assert 'class="message wrong"' in line
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("error", [RequestError("no <such> thing"), DrawingError("no <such> thing")])
async def test_what_the_service_says_is_shown_as_text(page: Page, service: FakeService, error: Exception) -> None:
    setattr(service, "refusal" if isinstance(error, RequestError) else "failure", error)
    assert "no &lt;such&gt; thing" in said((await updates(page))[-1], page)


async def test_an_unexpected_error_says_where_to_look(
    page: Page, service: FakeService, monkeypatch: pytest.MonkeyPatch, log_lines: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(service, "submit", None)
    assert "the server&#x27;s log says more" in said((await updates(page))[-1], page)
    assert [line["event"] for line in log_lines] == ["unexpected error"]


async def test_cancelling_stops_the_jobs_of_this_page_alone(page: Page, service: FakeService) -> None:
    service.held = True
    drawing = page.on_draw(filled_in(page), REQUEST)
    while "Step" not in (await anext(drawing)).get(page.message, ""):
        pass
    page.on_cancel(SimpleNamespace(session_hash="another"))
    [job] = service.jobs.values()
    assert job.status == "running"
    page.on_cancel(REQUEST)
    assert "Cancelled." in said([update async for update in drawing][-1], page)


async def test_a_page_that_is_closed_leaves_no_job(page: Page, service: FakeService) -> None:
    service.held = True
    drawing = page.on_draw(filled_in(page, compare=True), REQUEST)
    while "Step" not in (await anext(drawing)).get(page.message, ""):
        pass
    await drawing.aclose()
    service.held = False
    await service.drain()
    assert [job.status for job in service.jobs.values()] == ["cancelled"] * 2


async def test_another_bundle_has_its_own_controls(page: Page) -> None:
    controls, size = page.on_bundle("plain")
    assert controls["choices"] == [(NO_CONTROL, NO_CONTROL)] or controls["choices"] == [NO_CONTROL]
    assert size["value"] == "64x64"
    assert page.on_control("shapes", "canny") == "canny"
    assert page.on_control("shapes", "mask") == "none"


@pytest.mark.parametrize("annotator", OFFERED)
async def test_every_annotator_takes_what_its_fields_hold(page: Page, annotator: str) -> None:
    shown = await page.on_control_picture(filled_in(page, annotator=annotator))
    assert shown[page.control_error] == ""
    assert shown[page.shown_control].size == (64, 64)


def test_a_field_for_every_parameter(page: Page) -> None:
    count = sum(len(annotator.parameters) for annotator in OFFERED.values())
    assert len(page.parameters.fields) == count
    visible = [name for name, group in zip(OFFERED, page.parameters.groups, strict=True) if group.visible]
    assert visible == ["none"]


@pytest.fixture
async def visitor(request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(new_service(), Settings(api_keys=request.param), ui=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        yield client


@pytest.mark.parametrize("visitor", [()], indirect=True)
async def test_the_page_is_where_the_root_leads(visitor: httpx.AsyncClient) -> None:
    root = await visitor.get("/")
    assert (root.status_code, root.headers["location"]) == (307, "/ui/")
    page = await visitor.get("/ui/")
    assert page.status_code == 200
    config = (await visitor.get("/ui/config")).json()
    assert not config["analytics_enabled"]
    for text in (page.text, (await visitor.get("/ui/theme.css")).text):
        assert "googleapis" not in text
    assert (await visitor.get("/v1/bundles")).status_code == 200


@pytest.mark.parametrize("visitor", [("the-key", "schlüssel")], indirect=True)
async def test_with_keys_the_page_asks_for_one(visitor: httpx.AsyncClient) -> None:
    assert (await visitor.get("/ui/config")).status_code == 401
    assert (await visitor.get("/v1/bundles")).status_code == 401
    for key, status in (("wrong", 400), ("schlüssel", 200)):
        answer = await visitor.post("/ui/login", data={"username": "me", "password": key})
        assert answer.status_code == status
    assert (await visitor.get("/ui/config")).status_code == 200
    assert (await visitor.get("/v1/bundles")).status_code == 401
