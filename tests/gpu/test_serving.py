"""The server's engine on a GPU: requests at different steps share launches."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import pytest

from controlled_calls import PROMPT, square
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.server.engine import Engine
from controlrt.runtime.server.messages import Failed, Finished, Incoming, Refused, Stepped, Submit

pytestmark = [pytest.mark.gpu, pytest.mark.bundle]
MAX_MEAN_DIFFERENCE = 1.0
"""Of 255, between a picture drawn alone and in company: more rows have other kernels, which round otherwise."""

REQUESTS: dict[str, dict[str, Any]] = {
    "long": {"num_inference_steps": 12, "seed": 3},
    "short": {"num_inference_steps": 4, "seed": 5, "scheduler": "Euler a"},
    "without control": {"num_inference_steps": 6, "seed": 6, "image": None},
    "windowed": {"num_inference_steps": 8, "seed": 7, "control_guidance_end": 0.5, "prompt": "a black moon"},
}


def test_requests_of_different_steps_share_launches_and_look_as_alone(on_the_gpu: ControlNetPipeline) -> None:
    said: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
    heard: list[Incoming] = []
    finished: dict[str, Finished] = {}
    with Engine(on_the_gpu.bundle, said.put, batch=4) as engine:
        for name, changes in REQUESTS.items():
            arguments = {"prompt": PROMPT, "image": {"mask": square()}, **changes}
            engine.submit(Submit(id=name, arguments=arguments, deadline=None, previews=False, alone=False))
        while len(finished) < len(REQUESTS):
            heard.append(said.get(timeout=60))
            assert not isinstance(heard[-1], Failed | Refused), heard[-1]
            if isinstance(heard[-1], Finished):
                finished[heard[-1].id] = heard[-1]
    assert max(pictures for each in heard if isinstance(each, Stepped) for pictures, _ in each.steps) > 1
    for name, changes in REQUESTS.items():
        alone = on_the_gpu(**{"prompt": PROMPT, "image": {"mask": square()}, **changes}).images[0]
        difference = np.asarray(alone, np.int16) - finished[name].pictures[0]
        assert np.abs(difference).mean() <= MAX_MEAN_DIFFERENCE, name
