"""The web UI's interface upon a service that draws noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from webui_client import Client


@pytest.fixture(scope="module")
def connected() -> Iterator[Client]:
    from webui_client import Client  # needs the extra [serve]

    client = Client()
    yield client
    client.close()


@pytest.fixture
def web(connected: Client) -> Client:
    connected.reset()
    return connected
