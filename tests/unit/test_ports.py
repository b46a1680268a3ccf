"""Whether ports of this host can be published: looked at, and nothing stays bound."""

from __future__ import annotations

import socket

import pytest

from agent.cluster.server import check_port
from agent.errors import Conflict
from agent.model import Publish
from agent.ports import PortHolder, find_taken
from tests.ports import free_port

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
        holder.bind((held, free_port()))
        port = Publish(holder.getsockname()[1], 80, protocol, asked)
        found = find_taken([port])
        assert [taken.publish for taken in found] == ([port] if is_taken else [])
        assert all("in use" in taken.why and not taken.is_foreign for taken in found)
    assert find_taken([port, port]) == [], "free again, and it stays so"


def test_an_address_that_is_not_the_hosts_is_told_apart() -> None:
    [taken] = find_taken([Publish(8080, 80, "tcp", "192.0.2.1")])
    assert taken.is_foreign


@pytest.mark.parametrize("protocol", KINDS)
def test_what_a_sandbox_holds_is_taken_until_it_is_released(protocol: str) -> None:
    port, holder = Publish(free_port(), 80, protocol, "127.0.0.1"), PortHolder()
    holder.hold("a", [port])
    try:
        assert [taken.publish for taken in find_taken([port])] == [port]
        with pytest.raises(Conflict, match="in use"):
            holder.hold("b", [port])
    finally:
        holder.release("a")
    assert find_taken([port]) == []


def test_a_connection_that_has_ended_holds_no_port() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        where = server.getsockname()
        with socket.create_connection(where) as client:
            accepted, _ = server.accept()
            accepted.close()  # first: so it is this end that stays in TIME_WAIT
            assert client.recv(1) == b""
        port = Publish(where[1], 80, "tcp", "127.0.0.1")
        assert [taken.publish for taken in find_taken([port])] == [port], "it listens"
        with pytest.raises(Conflict, match="peer port 127"):
            check_port(*where)
    with socket.socket() as plain, pytest.raises(OSError):
        plain.bind(where)  # what a look without regard to it would say
    assert find_taken([port]) == []
    check_port(*where)


@pytest.mark.parametrize("protocol", KINDS)
def test_a_port_of_all_addresses_is_held_in_both_families_or_in_none(protocol: str) -> None:
    holder, kind = PortHolder(), KINDS[protocol]
    with socket.socket(socket.AF_INET6, kind) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::1", free_port()))
        port = Publish(other.getsockname()[1], 80, protocol)
        with pytest.raises(Conflict, match="in use"):
            holder.hold("a", [port])
        with socket.socket(socket.AF_INET, kind) as free:
            free.bind(("127.0.0.1", port.host_port))
    holder.hold("a", [port])
    try:
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family, kind) as late, pytest.raises(OSError, match="in use"):
                late.bind((address, port.host_port))
    finally:
        holder.release("a")
    assert find_taken([port]) == []
