"""--port and --publish as the ports of a service."""

from __future__ import annotations

import pytest

from agent.cli.serviceports import parse_ports
from agent.errors import Invalid

Row = tuple[int, int, str, int, str]  # port, target, protocol, published, published at


@pytest.mark.parametrize(
    ("ports", "publishes", "expected"),
    [
        (["80"], [], [(80, 80, "tcp", 0, "")]),
        (["80:8000"], [], [(80, 8000, "tcp", 0, "")]),
        (["53/udp", "53"], [], [(53, 53, "udp", 0, ""), (53, 53, "tcp", 0, "")]),
        (["80:8000"], ["8080:80"], [(80, 8000, "tcp", 8080, "")]),
        (["80:8000"], ["8080:8000"], [(80, 8000, "tcp", 8080, "")]),  # by its target
        (["80:8000", "8000:1"], ["9:8000"], [(80, 8000, "tcp", 0, ""), (8000, 1, "tcp", 9, "")]),
        (["80"], ["80"], [(80, 80, "tcp", 80, "")]),
        ([], ["8080:80"], [(80, 80, "tcp", 8080, "")]),
        (["80"], ["8080:80", "9090:80"], [(80, 80, "tcp", 8080, ""), (80, 80, "tcp", 9090, "")]),
        (["80"], ["10.0.0.5:8080:80"], [(80, 80, "tcp", 8080, "10.0.0.5")]),
        (["80"], ["10.0.0.5:80"], [(80, 80, "tcp", 80, "10.0.0.5")]),
        (["80"], ["[fd00::5]:8080:80"], [(80, 80, "tcp", 8080, "fd00::5")]),
        (["53/udp"], ["53/udp"], [(53, 53, "udp", 53, "")]),
        (["53/udp"], ["53"], [(53, 53, "udp", 0, ""), (53, 53, "tcp", 53, "")]),
    ],
)
def test_what_is_written_and_what_is_meant(
    ports: list[str], publishes: list[str], expected: list[Row]
) -> None:
    found = parse_ports(ports, publishes)
    rows = [(p.port, p.target, p.protocol, p.published, p.published_at) for p in found]
    assert rows == expected


@pytest.mark.parametrize(
    ("ports", "publishes"),
    [
        (["x"], []),
        (["0"], []),
        (["65536"], []),
        (["80:"], []),
        (["80:1:2"], []),
        (["80/icmp"], []),
        (["80/"], []),
        (["-80"], []),
        (["٣"], []),
        (["80:1", "80:2"], []),
        ([], [""]),
        ([], ["1:2:3:4"]),
        ([], ["[fd00::5]8080"]),
        ([], ["fd00::5:8080:80"]),
        ([], ["80:80/x"]),
    ],
)
def test_what_is_malformed_is_refused(ports: list[str], publishes: list[str]) -> None:
    with pytest.raises(Invalid):
        parse_ports(ports, publishes)
