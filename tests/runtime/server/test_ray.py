"""Two replicas on a Ray of this machine alone, one of which is killed."""

from __future__ import annotations

import base64
import io
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlled_calls import PROMPT
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.server.settings import Settings

ray = pytest.importorskip("ray", reason="without the extra [ray] there is no Ray")
pytest.importorskip("ray.serve", reason="without the extra [ray] there is no Ray Serve")
httpx = pytest.importorskip("httpx", reason="the client is httpx")

from controlrt.runtime.server import ray as on_ray  # noqa: E402 - needs Ray
from controlrt.runtime.server.ray import RayOptions  # noqa: E402

pytestmark = pytest.mark.bundle
STEPS = 2


@pytest.fixture(scope="module")
def server(demo_bundle: Path) -> Iterator[SimpleNamespace]:
    """``client`` of the interfaces, and ``handle`` of their deployment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: slow where the machine has other work
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        application = on_ray.build(RayOptions(bundles=(demo_bundle,), replicas=2, threads=1), Settings())
        with (
            on_ray.running(application, "127.0.0.1", port) as handle,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
        ):
            yield SimpleNamespace(client=client, handle=handle)
    finally:
        ray.shutdown()


def picture(result: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(result["images"][0]))), np.int16)


def replicas() -> list[str]:
    """Names of the actors that draw."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in named if "#bundle-" in each["name"]]


def test_every_accepted_request_is_drawn_though_a_replica_dies(
    server: SimpleNamespace, demo: ControlNetPipeline
) -> None:
    client = server.client

    def accepted(seed: int) -> str:
        body = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": seed, "wait": False}
        answer = client.post("/v1/generate", json=body)
        assert answer.status_code == 202, answer.text
        return answer.json()["url"]

    def waited(seed: int) -> dict[str, Any]:
        body = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": seed}
        answer = client.post("/v1/generate", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def fetched(url: str) -> dict[str, Any]:
        while (state := client.get(url).json())["status"] in ("queued", "running"):
            time.sleep(0.1)
        assert state["status"] == "done", state
        return state["result"]

    while client.get("/readyz").json() != {"status": "ready"}:
        time.sleep(0.1)
    killed, kept = replicas()
    with ThreadPoolExecutor(8) as pool:
        waiting = {seed: pool.submit(waited, seed) for seed in (0, 1)}
        urls = dict(zip(range(2, 6), pool.map(accepted, range(2, 6)), strict=True))
        ray.kill(ray.get_actor(killed, namespace="serve"))  # both have two or three of them
        results = {seed: fetched(url) for seed, url in urls.items()}
        results |= {seed: each.result() for seed, each in waiting.items()}
    for seed, result in results.items():
        assert result["seeds"] == [seed]
        expected = np.asarray(demo(PROMPT, num_inference_steps=STEPS, seed=seed).images[0], np.int16)
        assert np.abs(picture(result) - expected).max() <= 1  # threads may round otherwise
    while len(replicas()) < 2:
        time.sleep(0.1)
    assert kept in replicas()
    assert killed not in replicas()


def test_progress_refusals_and_cancellation(server: SimpleNamespace) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 0}
    streamed = server.client.post("/v1/generate", json={**body, "stream": True, "previews": True})
    events = [line.removeprefix("event: ") for line in streamed.text.splitlines() if line.startswith("event: ")]
    assert events[0] == "job"
    assert events[-1] == "result"
    assert "progress" in events
    refused = server.client.post("/v1/generate", json={**body, "scheduler": "Oiler"})
    assert refused.status_code == 422
    assert "Oiler" in refused.json()["error"]["message"]
    job = server.client.post("/v1/generate", json={**body, "num_inference_steps": 100, "wait": False}).json()
    assert server.client.delete(job["url"]).status_code == 200
    while (state := server.client.get(job["url"]).json())["status"] in ("queued", "running"):
        time.sleep(0.05)
    assert state["status"] == "cancelled"


def test_draining(server: SimpleNamespace) -> None:
    """The last test, since nothing is drawn after it."""
    body = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 0}
    with ThreadPoolExecutor(1) as pool:
        url = server.client.post("/v1/generate", json={**body, "wait": False}).json()["url"]
        running = pool.submit(server.client.post, "/v1/generate", json=body)
        time.sleep(0.2)
        drained = server.handle.drain.remote()
        while server.client.get("/readyz").json() != {"status": "draining"}:
            time.sleep(0.05)
        assert server.client.post("/v1/generate", json=body).status_code == 503
        assert running.result().status_code == 200
        while server.client.get(url).json()["status"] != "done":
            time.sleep(0.1)
        drained.result(timeout_s=60)
