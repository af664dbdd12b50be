"""A worker that draws nothing: its answers are told by the prompt, so that the service is tested in no time."""

from __future__ import annotations

import os
import struct
import time
from typing import Any

import numpy as np

from controlrt.runtime.server.channel import Channel
from controlrt.runtime.server.messages import (
    Accepted,
    Advanced,
    Broken,
    Cancel,
    Failed,
    Finished,
    Ready,
    Refused,
    Stop,
    Submit,
)
from controlrt.runtime.server.worker import WorkerOptions


def main(channel: Channel, options: WorkerOptions) -> None:
    """``options.batch`` says how often in a row it is broken from the start; with one thread it is soon taken to be
    stuck."""
    if options.batch:
        channel.send([Broken("cannot start")])
        return
    channel.send([Ready(silent_seconds=1.0 if options.threads == 1 else 60.0)])
    held: set[str] = set()
    while not isinstance(message := channel.receive(), Stop):
        if isinstance(message, Cancel):
            if message.id in held:
                channel.send([Failed(id=message.id, reason="cancelled", message="cancelled")])
            continue
        for answer in _answers(message):
            if answer == "die":
                os._exit(9)
            if answer == "garble":
                channel._end.sendall(struct.pack("<3Q", 1, 4, 0x2E2E2E2E))
                time.sleep(60)
            if answer == "hang":
                time.sleep(60)
            if answer == "hold":
                held.add(message.id)
            else:
                channel.send([answer])


def _answers(submit: Submit) -> list[Any]:
    name, prompt = submit.id, submit.arguments["prompt"]
    if prompt == "die unheard":
        return ["die"]
    if prompt == "garble once" and not submit.alone:
        return ["garble"]
    if prompt == "refuse":
        return [Refused(id=name, message="steps is 0, but must be from 1", parameter="steps")]
    accepted = Accepted(id=name, steps=3)
    if prompt == "hold":
        return [accepted, "hold"]
    if prompt == "slow":
        time.sleep(0.3)
    if prompt == "late":
        return [accepted, Failed(id=name, reason="deadline", message="out of time at step 1 of 3")]
    if prompt == "poison" or (prompt == "fail once" and not submit.alone):
        return [accepted, Failed(id=name, reason="engine", message="a kernel failed")]
    if prompt == "kill" or (prompt == "kill once" and not submit.alone):
        return [accepted, Advanced(id=name, step=0, previews=()), "die"]
    if prompt == "hang once" and not submit.alone:
        return [accepted, Advanced(id=name, step=0, previews=()), "hang"]
    picture = np.full((8, 8, 3), submit.arguments["seed"] % 256, np.uint8)
    steps = [Advanced(id=name, step=step, previews=(picture[:1, :1],)) for step in (1, 2)]
    seconds = {"queued": 0.0, "steps": 0.1, "decode": 0.0, "total": 0.1}
    return [
        accepted,
        *steps,
        Finished(id=name, pictures=(picture,), seeds=(submit.arguments["seed"],), seconds=seconds),
    ]
