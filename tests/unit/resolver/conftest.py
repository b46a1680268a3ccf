"""What holds for all tests of the name server."""

from __future__ import annotations

import pytest

from agent.resolver import client


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that gives up on a name server only where it is clear that there is none: what an
    agent takes for too long is little on a machine that is busy with other tests."""
    for name in ("OPEN_SECONDS", "GREET_SECONDS", "QUERY_SECONDS", "STOP_SECONDS"):
        monkeypatch.setattr(client, name, 60.0)
