"""Running calls, options and lists of the web UI's interface, on a service that draws noise."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from webui_client import SMALL, Client, opened


def test_progress_skip_and_interrupt(web: Client) -> None:
    web.service.step_seconds = 0.02

    async def watch(client: Any) -> tuple[Any, ...]:
        call = {**SMALL, "steps": 10, "seed": 7, "n_iter": 3, "force_task_id": "task"}
        drawing = asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=call))
        while len(web.service.jobs) < 3 or list(web.service.jobs.values())[2].progress.step < 3:
            await asyncio.sleep(0.01)
        seen = (await client.get("/sdapi/v1/progress")).json()
        bare = (await client.get("/sdapi/v1/progress?skip_current_image=true")).json()
        skipped = await client.post("/sdapi/v1/skip")
        while list(web.service.jobs.values())[1].status != "done":
            await asyncio.sleep(0.01)
        interrupted = await client.post("/sdapi/v1/interrupt")
        return seen, bare, skipped.json(), interrupted.json(), (await drawing).json()

    seen, bare, skipped, interrupted, answer = web.run(watch)
    assert 0 < seen["progress"] < 1
    assert seen["eta_relative"] > 0
    assert seen["state"]["job"] == "task"
    assert (seen["state"]["job_count"], seen["state"]["sampling_steps"]) == (3, 10)
    assert opened(seen["current_image"]).size == (8, 8)
    assert bare["current_image"] is None
    assert (skipped, interrupted) == (None, {})
    seeds = json.loads(answer["info"])["all_seeds"]
    assert 7 not in seeds
    assert 8 in seeds
    assert len(answer["images"]) == len(seeds)
    idle = web.get("/sdapi/v1/progress")
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)


def test_with_nothing_to_do_skip_and_interrupt_do_nothing(web: Client) -> None:
    assert web.post("/sdapi/v1/interrupt", {}) == {}
    assert web.post("/sdapi/v1/skip", {}) is None


def test_options_switch_the_bundle_for_all_calls(web: Client) -> None:
    first = web.get("/sdapi/v1/options")
    assert first["sd_model_checkpoint"] == "sd15 [0000000000]"
    assert first["CLIP_stop_at_last_layers"] == 1
    web.post("/sdapi/v1/options", {"sd_model_checkpoint": "plain [0000000000]", "CLIP_stop_at_last_layers": 2.0})
    assert web.get("/sdapi/v1/options")["sd_model_checkpoint"].startswith("plain")
    web.txt2img(prompt="a")
    assert web.service.requests[-1].bundle == "plain"
    assert web.arguments()["clip_skip"] == 1
    assert web.get("/controlnet/model_list") == {"model_list": []}
    web.txt2img(prompt="a", override_settings={"sd_model_checkpoint": "sd15", "randn_source": "CPU"})
    assert web.service.requests[-1].bundle == "sd15"
    assert web.arguments()["noise"] == "cpu"
    assert web.get("/sdapi/v1/options")["sd_model_checkpoint"].startswith("plain")
    keep = {"override_settings_restore_afterwards": False}
    web.txt2img(prompt="a", override_settings={"sd_model_checkpoint": "sd15"}, **keep)
    assert web.get("/sdapi/v1/options")["sd_model_checkpoint"].startswith("sd15")
    assert "no_such" in web.post("/sdapi/v1/options", {"no_such": 1}, 422)["detail"]


def test_options_can_be_sent_back_as_they_came(web: Client) -> None:
    web.post("/sdapi/v1/options", web.get("/sdapi/v1/options"))


def test_lists(web: Client) -> None:
    samplers = {one["name"]: one for one in web.get("/sdapi/v1/samplers")}
    assert "k_euler_a" in samplers["Euler a"]["aliases"]
    assert "Karras" in [one["label"] for one in web.get("/sdapi/v1/schedulers")]
    assert [one["name"] for one in web.get("/sdapi/v1/upscalers")] == ["Lanczos", "Nearest", "None"]
    assert [one["model_name"] for one in web.get("/sdapi/v1/sd-models")] == ["sd15", "plain"]
    assert web.get("/sdapi/v1/loras")[0]["name"] == "ink"
    assert web.get("/sdapi/v1/embeddings") == {"loaded": {}, "skipped": {}}
    for path in ("latent-upscale-modes", "sd-vae", "hypernetworks", "face-restorers", "prompt-styles"):
        assert web.get(f"/sdapi/v1/{path}") == []
    assert web.post("/sdapi/v1/refresh-checkpoints", {}) is None
    assert web.get("/sdapi/v1/scripts")["txt2img"] == ["controlnet"]
