"""Whether ports of this host can be published: looked at, and nothing stays bound."""

from __future__ import annotations

import socket

import pytest

from agent.model import Publish
from agent.ports import find_taken

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@pytest.mark.parametrize("protocol", KINDS)
@pytest.mark.parametrize(("held", "asked", "is_taken"), [
    ("127.0.0.1", "127.0.0.1", True),
    ("127.0.0.1", "", True),
    ("0.0.0.0", "127.0.0.1", True),
    ("127.0.0.1", "127.0.0.2", False),
])  # fmt: skip
def test_what_something_holds_is_found(
    protocol: str, held: str, asked: str, is_taken: bool
) -> None:
    with socket.socket(socket.AF_INET, KINDS[protocol]) as holder:
        holder.bind((held, 0))
        port = Publish(holder.getsockname()[1], 80, protocol, asked)
        found = find_taken([port])
        assert [taken.publish for taken in found] == ([port] if is_taken else [])
        assert all("in use" in taken.why and not taken.is_foreign for taken in found)
    assert find_taken([port, port]) == [], "free again, and it stays so"


def test_an_address_that_is_not_the_hosts_is_told_apart() -> None:
    [taken] = find_taken([Publish(8080, 80, "tcp", "192.0.2.1")])
    assert taken.is_foreign
