"""What `run --publish` reads: one port, a range, an address, and what it refuses."""

from __future__ import annotations

import pytest

from agent.cli.run import _parse_publish
from agent.errors import Invalid


def test_a_range_is_its_ports_one_by_one() -> None:
    assert _parse_publish("8000-8002:80-82/udp") == [
        ("", 8000, 80, "udp"),
        ("", 8001, 81, "udp"),
        ("", 8002, 82, "udp"),
    ]
    assert _parse_publish("[fd00::1]:53:5353") == [("fd00::1", 53, 5353, "tcp")]


@pytest.mark.parametrize("text", ["80", "8000-8001:80", "9-8:9-8", "a:80", "1-:80", "-1:80", ":"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="--publish"):
        _parse_publish(text)
