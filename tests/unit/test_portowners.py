"""Who has a port: real sockets of this process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent.portowners import PortOwner, find_owner


def own_command() -> str:
    return Path("/proc/self/comm").read_text().strip()


def test_who_listens_is_named_with_its_process_and_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        owner = find_owner("tcp", port)
        assert owner == PortOwner("127.0.0.1", os.getpid(), own_command())
        assert str(owner) == f"{own_command()} (process {os.getpid()}) at 127.0.0.1"
        assert find_owner("tcp", port, "127.0.0.1") == owner
        assert find_owner("tcp", port, "127.0.0.2") is None
        assert find_owner("udp", port) is None
    assert find_owner("tcp", port) is None


def test_who_has_a_port_at_all_addresses_has_it_at_each() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 0))
        owner = find_owner("udp", sock.getsockname()[1], "127.0.0.1")
        assert owner and owner.address == "0.0.0.0"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_addresses_are_read() -> None:
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        sock.listen()
        owner = find_owner("tcp", sock.getsockname()[1], "::1")
        assert owner and owner.address == "::1"


def test_a_connection_from_a_port_does_not_have_it() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert find_owner("tcp", client.getsockname()[1]) is None


def test_a_process_that_cannot_be_seen_is_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "self" / "net"
    folder.mkdir(parents=True)
    row = "0: 0100007F:1F90 00000000:0000 0A 0:0 0:0 0 0 0 4711 1\n"
    (folder / "tcp").write_text("header\n" + row)
    owner = find_owner("tcp", 8080, proc=tmp_path)
    assert owner == PortOwner("127.0.0.1", 0, "")
    assert str(owner) == "another process at 127.0.0.1"
