"""--port and --publish of `vxmesh service`, as the ports of a service.

What stands opposite: agent/servicespec.py, which checks the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from agent.errors import Invalid

if TYPE_CHECKING:
    from agent.rpc.types_pb2 import ServicePort


class _Wanted(NamedTuple):
    address: str
    published: int
    port: int
    protocol: str


def parse_ports(ports: Sequence[str], publishes: Sequence[str]) -> list[ServicePort]:
    """One for each port, and one for each place where it is published.

    A --publish leads to the port of the service that it names or, if there is none, to the one
    with that target; one that fits none makes a port. Invalid if something is malformed.
    """
    from agent.rpc.types_pb2 import ServicePort

    made: dict[tuple[int, str], int] = {}
    for text in ports:
        port, target, protocol = _parse_port(text)
        if made.setdefault((port, protocol), target) != target:
            raise Invalid(f"--port {text}", "was given with another target", "Give it once")
    published: dict[tuple[int, str], list[_Wanted]] = {}
    for text in publishes:
        wanted = _parse_publish(text)
        key = (wanted.port, wanted.protocol)
        if key not in made:
            by_target = [k for k, t in made.items() if (t, k[1]) == key]
            if by_target:
                key = by_target[0]
            else:
                made[key] = wanted.port
        published.setdefault(key, []).append(wanted)
    found = []
    for (port, protocol), target in made.items():
        for each in published.get((port, protocol), [_Wanted("", 0, port, protocol)]):
            found.append(
                ServicePort(
                    port=port,
                    target=target,
                    protocol=protocol,
                    published=each.published,
                    published_at=each.address,
                )
            )
    return found


def _parse_port(text: str) -> tuple[int, int, str]:
    numbers, protocol = _split(text, "--port")
    port, colon, target = numbers.partition(":")
    first = _number(port, text, "--port")
    return first, _number(target, text, "--port") if colon else first, protocol


def _parse_publish(text: str) -> _Wanted:
    rest, protocol = _split(text, "--publish")
    address = ""
    if rest.startswith("["):  # [fd00::5]:8080:80
        address, bracket, rest = rest[1:].partition("]:")
        if not bracket:
            raise _malformed(text, "--publish")
    elif rest.count(":") == 2 or ("." in rest.partition(":")[0]):
        address, _, rest = rest.partition(":")
    published, colon, port = rest.partition(":")
    first = _number(published, text, "--publish")
    return _Wanted(address, first, _number(port, text, "--publish") if colon else first, protocol)


def _split(text: str, flag: str) -> tuple[str, str]:
    numbers, slash, protocol = text.partition("/")
    if slash and protocol not in ("tcp", "udp"):
        raise Invalid(f"{flag} {text[:40]!r}", "has no protocol that is known", "End it in /udp")
    return numbers, protocol or "tcp"


def _number(text: str, whole: str, flag: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:6]) <= 65535:
        raise _malformed(whole, flag)
    return int(text)


def _malformed(text: str, flag: str) -> Invalid:
    form = "PORT[:TARGET][/udp]" if flag == "--port" else "[IP:]PORT[:PORT][/udp]"
    return Invalid(f"{flag} {text[:40]!r}", "is malformed", f"Write {form}, ports 1 to 65535")
