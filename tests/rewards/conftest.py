"""What tests of rewards share: a server to ask, and no long pauses before it is asked again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from servers import Server

from whet.rewards import endpoint


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
