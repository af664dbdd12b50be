"""What a worker says reaches the service: what somebody acts on at once, what only counts together."""

from __future__ import annotations

import time

import pytest

from controlrt.runtime.server import worker
from controlrt.runtime.server.channel import Channel
from controlrt.runtime.server.messages import Accepted, Advanced, Failed, Incoming, Ready, Stepped
from controlrt.runtime.server.worker import Outbox


@pytest.fixture(autouse=True)
def for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may lie lies longer than a test takes."""
    for name in ("PATIENCE", "TELL_SECONDS"):
        monkeypatch.setattr(worker, name, 600.0)


def words(count: int, *, watched: bool = True) -> list[Incoming]:
    """On where requests are."""
    said: list[Incoming] = [Accepted(id="a", steps=4, watched=watched), Stepped(steps=((1, 0.01),))]
    return [*said, *(Advanced(id="a", step=step, previews=(), watched=watched) for step in range(count))]


@pytest.mark.parametrize(("watched", "patience"), [(True, "PATIENCE"), (False, "TELL_SECONDS")])
def test_words_on_where_requests_are_go_together(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch, *, watched: bool, patience: str
) -> None:
    monkeypatch.setattr(worker, patience, 0.2)
    here, there = ends
    outbox = Outbox(there)
    started = time.monotonic()
    for message in words(4, watched=watched):
        outbox.put(message)
    assert here.receive() == words(4, watched=watched)
    assert 0.2 <= time.monotonic() - started < 2.2
    outbox.close()


def test_words_on_who_is_watched_take_along_those_on_others(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.0)
    here, there = ends
    outbox = Outbox(there)
    said = [*words(2, watched=False), Accepted(id="b", steps=4)]
    for message in said:
        outbox.put(message)
    assert here.receive() == said
    outbox.close()


@pytest.mark.parametrize(
    "pressing", [Ready(silent_seconds=300.0), Failed(id="a", reason="cancelled", message="cancelled")]
)
def test_what_somebody_waits_for_takes_along_what_lay_there(ends: tuple[Channel, Channel], pressing: Incoming) -> None:
    here, there = ends
    outbox = Outbox(there)
    said = [*words(2), pressing]
    for message in said:
        outbox.put(message)
    assert here.receive() == said  # in their order
    outbox.close()


def test_at_the_end_nothing_is_left(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    outbox = Outbox(there)
    for message in words(3):
        outbox.put(message)
    outbox.close()
    assert here.receive() == words(3)


def test_nobody_listens_any_more(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    here.close()
    outbox = Outbox(there)
    outbox.put(Ready(silent_seconds=300.0))
    outbox.close()  # returns
