"""The OpenAPI document: it can be read, its examples are right, and no request that it allows breaks the server."""
# ruff: noqa: E402 - much of it is there with the extra [serve] only

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
schemathesis = pytest.importorskip("schemathesis", reason="the requests are schemathesis'")

from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.request_body import to_job_request
from controlrt.runtime.server.schemas import EXAMPLE_PICTURE, PICTURES, GenerateRequest
from controlrt.runtime.server.settings import Settings
from fake_service import FakeService

EXAMPLES = 20
LIMITS = Settings(max_steps=1000, max_body_bytes=100_000)
OPERATIONS = (
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("POST", "/v1/generate"),
    ("GET", "/v1/jobs/{job_id}"),
    ("DELETE", "/v1/jobs/{job_id}"),
    ("GET", "/v1/jobs/{job_id}/events"),
    ("GET", "/v1/bundles"),
)


@pytest.fixture(scope="module")
def schema() -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", build_app(FakeService(), LIMITS))


def test_every_operation_can_be_read(schema: schemathesis.BaseSchema) -> None:
    assert {each.ok().label for each in schema.get_all_operations()} >= {" ".join(each) for each in OPERATIONS}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_breaks_the_server(schema: schemathesis.BaseSchema, method: str, path: str) -> None:
    """504 is what a request of one millisecond gets, and no breakage."""
    statuses: Counter[int] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schema[path][method].as_strategy())
    def ask(case: schemathesis.Case) -> None:
        for body in (case.body, drawable(case.body)) if isinstance(case.body, dict) else (case.body,):
            case.body = body
            response = case.call()
            statuses[response.status_code] += 1
            assert response.status_code < 500 or response.status_code == 504, response.text

    ask()
    assert statuses[404 if "{job_id}" in path else 200] > 0, statuses


def drawable(body: dict[str, Any]) -> dict[str, Any]:
    """The same request with pictures that are some, and of a size that the fake draws: it gets further."""

    def pictures(value: Any) -> Any:
        if isinstance(value, dict):
            return {"canny": EXAMPLE_PICTURE}
        return EXAMPLE_PICTURE

    kept = {name: value for name, value in body.items() if name not in ("width", "height", "model", "timeout_ms")}
    return {name: pictures(value) if name in PICTURES and value else value for name, value in kept.items()}


def test_examples_can_be_drawn() -> None:
    [example] = GenerateRequest.model_json_schema()["examples"]
    request = to_job_request(GenerateRequest.model_validate(example), Settings())
    assert request.arguments["image"]["canny"].size == (64, 64)
    assert request.arguments["scheduler"] == example["scheduler"]


def test_every_field_is_described(schema: schemathesis.BaseSchema) -> None:
    content = schema.raw_schema["paths"]["/v1/generate"]["post"]["requestBody"]["content"]
    for form in ("application/json", "multipart/form-data"):
        properties = content[form]["schema"]["properties"]
        assert list(properties) == list(GenerateRequest.model_fields)
    assert all(each["description"] for each in content["application/json"]["schema"]["properties"].values())


def test_the_document_has_no_loose_ends(schema: schemathesis.BaseSchema) -> None:
    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(each) for each in node.values()))
        return set().union(*(references(each) for each in node)) if isinstance(node, list) else set()

    document = schema.raw_schema
    for reference in references(document):
        place = document
        for key in reference.removeprefix("#/").split("/"):
            place = place[key]
