"""What a worker says reaches the service: what somebody acts on at once, what only counts together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import pytest

from controlrt.runtime.server.messages import Accepted, Advanced, Failed, Incoming, Ready, Stepped
from controlrt.runtime.server.worker import PATIENCE, Outbox


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    here, there = Pipe()
    yield here, there
    here.close()
    there.close()


def steps(count: int) -> list[Incoming]:
    """News of some steps, none of which anybody waits for."""
    said: list[Incoming] = []
    for step in range(1, count + 1):
        said += [Advanced(id="a", step=step, previews=()), Stepped(pictures=1, seconds=0.01)]
    return said


def test_steps_go_together_and_do_not_lie_for_long(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    outbox = Outbox(there)
    started = time.monotonic()
    for message in steps(10):
        outbox.put(message)
    assert here.recv() == steps(10)
    assert 0.9 * PATIENCE < time.monotonic() - started < PATIENCE + 2
    outbox.close()


@pytest.mark.parametrize(
    "pressing",
    [
        Ready(silent_seconds=300.0),
        Accepted(id="a", steps=4),
        Advanced(id="a", step=0, previews=()),  # it has begun: whoever tries it again must know
        Failed(id="a", reason="cancelled", message="cancelled"),
    ],
)
def test_what_somebody_acts_on_takes_along_what_lay_there(
    ends: tuple[Connection, Connection], pressing: Incoming
) -> None:
    here, there = ends
    outbox = Outbox(there)
    said = [*steps(2), pressing]
    for message in said:
        outbox.put(message)
    assert here.poll(PATIENCE / 2)
    assert here.recv() == said  # in their order
    outbox.close()


def test_what_begins_a_request_goes_together(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    outbox = Outbox(there)
    said: list[Incoming] = [Accepted(id="a", steps=4), Advanced(id="a", step=0, previews=())]
    for message in said:
        outbox.put(message)
    assert here.recv() == said
    outbox.close()


def test_a_preview_is_shown_at_once(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    outbox = Outbox(there)
    outbox.put(Advanced(id="a", step=1, previews=(np.zeros((8, 8, 3), np.uint8),)))
    assert here.poll(PATIENCE / 2)
    outbox.close()


def test_at_the_end_nothing_is_left(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    outbox = Outbox(there)
    for message in steps(3):
        outbox.put(message)
    outbox.close()
    assert here.poll(0)
    assert here.recv() == steps(3)


def test_nobody_listens_any_more(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    here.close()
    outbox = Outbox(there)
    outbox.put(Ready(silent_seconds=300.0))
    outbox.close()  # returns
