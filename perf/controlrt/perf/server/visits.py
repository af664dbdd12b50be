"""The kinds of request of a soak: how each goes, and how it may end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from controlrt.perf.server.client import GENERATE, Answer, Client, decode_picture
from controlrt.perf.server.expected import Expected

KINDS = {"draw": 60, "job": 10, "stream": 10, "cancel": 5, "disconnect": 5, "timeout": 5, "malformed": 5}
"""Shares of the requests.

draw        waits for its picture
job         asks for a job and comes back for its picture
stream      reads server-sent events, previews among them, until the picture is there
cancel      asks for a job and cancels it somewhat later
disconnect  goes away while it waits
timeout     gives the server too little time, mostly
malformed   is none
"""
_PATIENCE = 0.5
"""Seconds after which, at most, somebody cancels, leaves or is out of time."""
_JOB_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a request ended."""

    kind: str
    ended: str
    lost: str = ""
    """Why that is none of the ends that it may have; empty where it is one."""
    mixed_up: str = ""
    """What is wrong with its picture; empty where that is right."""
    psnr_db: float | None = None
    """Of its picture, where it got one."""


async def visit(client: Client, kind: str, expected: Expected, random: np.random.Generator) -> Outcome:
    """One request of a kind, for a random one of the expected pictures."""
    return await _VISITS[kind](client, expected, random)


async def _draw(client: Client, expected: Expected, random: np.random.Generator) -> Outcome:
    number, body = _pick(expected, random)
    return _judged("draw", await client.generate(body), expected, number)


async def _job(client: Client, expected: Expected, random: np.random.Generator) -> Outcome:
    number, body = _pick(expected, random, wait=False)
    accepted = await client.generate(body)
    if accepted.status != 202:
        return _unexpected("job", accepted)
    state = await _finished_job(client, accepted.fields()["url"])
    if state.fields().get("status") != "done":
        return _unexpected("job", state)
    return _compared("job", state.fields()["result"], expected, number)


async def _stream(client: Client, expected: Expected, random: np.random.Generator) -> Outcome:
    number, body = _pick(expected, random, stream=True, previews=True)
    answer = await client.generate(body)
    events = read_events(answer.body.decode(errors="replace")) if answer.status == 200 else []
    if not events or events[-1][0] != "result" or events[-1][1] is None:
        return _unexpected("stream", answer)
    return _compared("stream", events[-1][1], expected, number)


async def _cancel(client: Client, expected: Expected, random: np.random.Generator) -> Outcome:
    number, body = _pick(expected, random, wait=False)
    accepted = await client.generate(body)
    if accepted.status != 202:
        return _unexpected("cancel", accepted)
    await asyncio.sleep(random.uniform(0, _PATIENCE))
    url = accepted.fields()["url"]
    deleted = await client.send("DELETE", url)
    if deleted.status != 200:
        return _unexpected("cancel", deleted)
    state = await _finished_job(client, url)
    status = state.fields().get("status")
    if status == "cancelled":
        return Outcome(kind="cancel", ended="cancelled")
    if status == "done":  # it was quicker
        return _compared("cancel", state.fields()["result"], expected, number)
    return _unexpected("cancel", state)


async def _disconnect(client: Client, expected: Expected, random: np.random.Generator) -> Outcome:
    number, body = _pick(expected, random)
    waiting = asyncio.ensure_future(client.generate(body))
    done, _ = await asyncio.wait({waiting}, timeout=random.uniform(0, _PATIENCE))
    if done:
        return _judged("disconnect", waiting.result(), expected, number)
    waiting.cancel()
    await asyncio.wait({waiting})
    return Outcome(kind="disconnect", ended="gone")


async def _timeout(client: Client, expected: Expected, random: np.random.Generator) -> Outcome:
    number, body = _pick(expected, random, timeout_ms=round(random.uniform(1, 1000 * _PATIENCE)))
    answer = await client.generate(body)
    if answer.status == 504:
        return Outcome(kind="timeout", ended="timed out")
    return _judged("timeout", answer, expected, number)


async def _malformed(client: Client, expected: Expected, random: np.random.Generator) -> Outcome:
    _, body = _pick(expected, random)
    content = malformed(body, int(random.integers(len(_SPOILS) + 1)))
    answer = await client.send("POST", GENERATE, content)
    if answer.status in (400, 413, 415, 422):
        return Outcome(kind="malformed", ended=f"refused {answer.status}")
    return _unexpected("malformed", answer)


_VISITS: dict[str, Callable[[Client, Expected, np.random.Generator], Awaitable[Outcome]]] = {
    "draw": _draw,
    "job": _job,
    "stream": _stream,
    "cancel": _cancel,
    "disconnect": _disconnect,
    "timeout": _timeout,
    "malformed": _malformed,
}

_SPOILS: tuple[dict[str, Any], ...] = (
    {"prompt": 7},
    {"promptt": "a red star"},
    {"num_inference_steps": 0},
    {"num_inference_steps": 100_000},
    {"scheduler": "no such sampler"},
    {"image": {"no such control": ""}},
    {"image": "https://example.com/picture.png"},
    {"init_image": "this is no base64"},
    {"init_image": "aGVsbG8="},
    {"width": 100},
    {"seed": "seven"},
    {"model": "no such bundle"},
    {"guidance_scale": None},
    {"timeout_ms": -1},
    {"prompt": []},
    {"prompt": ["a red star"] * 100},
)


def malformed(body: dict[str, Any], number: int) -> bytes:
    """A good body spoiled; one number after the last spoils its JSON."""
    if number == len(_SPOILS):
        return json.dumps(body).encode()[:-5]
    return json.dumps(body | _SPOILS[number]).encode()


def read_events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events by name, with their data."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(":"))
        if "event" in lines and "data" in lines:
            found.append((lines["event"], _read(lines["data"])))
    return found


def _read(data: str) -> Any:
    """What an event says; None where the connection broke within it."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def _pick(expected: Expected, random: np.random.Generator, **fields: Any) -> tuple[int, dict[str, Any]]:
    number = int(random.integers(len(expected.asked)))
    return number, expected.asked[number].body(**fields)


async def _finished_job(client: Client, url: str) -> Answer:
    """The state of a job once it is finished."""
    until = asyncio.get_running_loop().time() + _JOB_SECONDS
    while True:
        answer = await client.send("GET", url)
        unfinished = answer.fields().get("status") in ("queued", "running")
        if not unfinished or asyncio.get_running_loop().time() > until:
            return answer
        await asyncio.sleep(0.05)


def _judged(kind: str, answer: Answer, expected: Expected, number: int) -> Outcome:
    if answer.status != 200:
        return _unexpected(kind, answer)
    return _compared(kind, answer.fields(), expected, number)


def _compared(kind: str, result: dict[str, Any], expected: Expected, number: int) -> Outcome:
    """A result beside the picture that its request should have."""
    picture, asked = decode_picture(result["images"][0]), expected.asked[number]
    found = expected.likeness(picture, number)
    wrong = ""
    if found < expected.min_psnr_db or result["seeds"] != [asked.seed]:
        nearest = expected.asked[expected.nearest(picture)].seed
        wrong = f"{kind}: {asked} has {found:.1f} dB and seeds {result['seeds']}; nearest is seed {nearest}"
    return Outcome(kind=kind, ended="drawn", mixed_up=wrong, psnr_db=found)


def _unexpected(kind: str, answer: Answer) -> Outcome:
    said = answer.body[-200:].decode(errors="replace")
    return Outcome(kind=kind, ended=f"unexpected {answer.status}", lost=f"{kind}: {answer.status}: {said}")
