"""What a worker says reaches the service: what somebody acts on at once, what only counts together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from controlrt.runtime.server import worker
from controlrt.runtime.server.messages import Accepted, Advanced, Failed, Incoming, Ready, Stepped
from controlrt.runtime.server.worker import Outbox


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    here, there = Pipe()
    yield here, there
    here.close()
    there.close()


def words(count: int) -> list[Incoming]:
    """On where requests are."""
    said: list[Incoming] = [Accepted(id="a", steps=4), Stepped(steps=((1, 0.01),))]
    return [*said, *(Advanced(id="a", step=step, previews=()) for step in range(count))]


def test_words_on_where_requests_are_go_together(
    ends: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.2)
    here, there = ends
    outbox = Outbox(there)
    started = time.monotonic()
    for message in words(4):
        outbox.put(message)
    assert here.recv() == words(4)
    assert 0.2 <= time.monotonic() - started < 2.2
    outbox.close()


@pytest.mark.parametrize(
    "pressing", [Ready(silent_seconds=300.0), Failed(id="a", reason="cancelled", message="cancelled")]
)
def test_what_somebody_waits_for_takes_along_what_lay_there(
    ends: tuple[Connection, Connection], pressing: Incoming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 600.0)
    here, there = ends
    outbox = Outbox(there)
    said = [*words(2), pressing]
    for message in said:
        outbox.put(message)
    assert here.recv() == said  # in their order
    outbox.close()


def test_at_the_end_nothing_is_left(ends: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 600.0)
    here, there = ends
    outbox = Outbox(there)
    for message in words(3):
        outbox.put(message)
    outbox.close()
    assert here.poll(0)
    assert here.recv() == words(3)


def test_nobody_listens_any_more(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    here.close()
    outbox = Outbox(there)
    outbox.put(Ready(silent_seconds=300.0))
    outbox.close()  # returns
