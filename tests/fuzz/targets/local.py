"""What users and scripts hand in: control requests, words of the command line, files."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

from google.protobuf.message import DecodeError

from agent import config, interfaceops, model, notation, requests, sandboxops
from agent.api import errors
from agent.api.control import Control
from agent.api.watch import Watchers
from agent.cli import calls
from agent.cluster.server import split_address
from agent.core.addresses import Range
from agent.errors import VxmeshError
from agent.node import NodeState
from agent.operations import Operations
from agent.plan import Plan
from agent.resolver.forward import parse_resolv_conf
from agent.resolver.sockets import parse_listen
from agent.rpc import control_pb2 as pb
from agent.testbed import state as bed
from agent.workload import Namespace
from tests.fuzz import world
from tests.fuzz.engine import Target, scratch
from tests.fuzz.inputs import TEXTS, number, text
from tests.fuzz.shapes import Known, input_of, message
from tests.fuzz.targets.unary import LOOP, Aborted, Context

METHODS = [m for m in pb.DESCRIPTOR.services_by_name["Control"].methods if m.name != "LeaveNode"]
CONTROL = Known({
    "ref": ("web", "db", world.NET, world.LOCAL, "one", "h1", "h2", "e1", "1"), "all": (0, 1),
    "refs": ("web", "db", "one", world.NET, "h2", "e1e1"), "network": ("web", "db", world.NET, ""),
    "networks": ("web", "db"), "name": ("n1", "two", "three", "web"), "driver": ("", "overlay"),
    "subnets": ("10.3.0.0/24", "10.3.1.0/24", "fd00:3::/64"), "gateways": ("10.3.0.1",),
    "ip_range": ("", "10.3.0.64/26"), "mtu": (0, 1450), "vni": (0, 77), "node": ("", "h1"),
    "addresses": ("10.1.0.20", "10.1.0.21", "fd00:1::20"), "mac": ("", "02:00:5e:00:53:07"),
    "aliases": ("a1", "a2"), "netns": ("", "ns1"), "ifname": ("", "eth0"), "pid": (1, 77),
    "sandbox": ("", "", "one"), "priority": (0, 1), "defaults": ("web", "db"),
    "host_port": (80, 8080), "target_port": (80,), "protocol": ("", "tcp", "udp"),
    "host_address": ("", "10.99.0.1"), "type": ("", "A"), "since": (0,), "seconds": (0.0, 0.0, 1.0),
    "right": ("read",), "key": ("k1", "k2", "a.b/c"),
    "lines": (b'{"name":"l1","mac":"02:00:5e:00:53:09","addresses":["10.1.0.30"]}\n',),
})  # fmt: skip


class Settled:
    """As Kernel and Cluster: everything is done at once, and nobody else is there."""

    def __init__(self, node: NodeState) -> None:
        self._node = node

    async def settle(self, endpoint: str | None = None) -> None:
        """Done."""
        self._node.kernel_has(self._node.versions())

    async def wait_applied(
        self, version: int, seconds: float, networks: Sequence[str] = ()
    ) -> dict[str, str]:
        """Everybody has it."""
        return {}

    async def request_space(
        self, owner: str, network: model.Network, family: int, ranges: list[Range]
    ) -> str:
        """Nothing is donated."""
        return "no"


class Offices:
    """Departures, administration, users, encryption, metrics and the resolver, of whom only words
    are asked."""

    async def remove_nodes(
        self, refs: Sequence[str], wait: float, *, force: bool = False
    ) -> list[str]:
        """None of them."""
        return []

    async def rotate(self) -> None:
        """No key is changed."""

    async def join_token(self, rotate: bool) -> pb.JoinToken:
        """One that is none."""
        return pb.JoinToken()

    async def rotate_authority(self, force: bool) -> pb.Cluster:
        """Nothing is done."""
        return pb.Cluster()

    async def cluster(self) -> pb.Cluster:
        """Nothing is known."""
        return pb.Cluster()

    def issue(self, name: str, right: str, request: bytes) -> pb.UserCertificate:
        """Nobody is let in."""
        return pb.UserCertificate()

    async def resolve(self, name: str, type: str, networks: list[str]) -> pb.ResolveReply:
        """Nothing is found."""
        return pb.ResolveReply()

    async def text(self) -> bytes:
        """Nothing is counted."""
        return b""

    def hold(self, sandbox: str, publishes: Sequence[model.Publish]) -> None:
        """No port is taken."""

    def release(self, sandbox: str) -> None:
        """Nor given back."""


async def _durable() -> None:
    pass


def _identify(ref: str, pid: int = 0) -> Namespace:
    if "\0" in ref:
        raise VxmeshError("namespace", "is no path")
    return Namespace(ref, 77, 1)


def _raise(method: str, failure: Exception) -> VxmeshError:
    raise failure


def make_control(state: NodeState) -> Control:
    """The servicer of a node, with nothing behind it."""
    settled, offices = Settled(state), cast(Any, Offices())
    made = Operations(state, settled, settled, _durable)
    made.ports = offices
    watchers = Watchers(state, world.Rtt())
    servicer = Control(
        state, made, offices, world.Rtt(), offices, watchers, offices, offices, offices
    )
    servicer.users = offices
    return servicer


def request(data: bytes) -> None:
    """A request at the servicer: the first byte chooses the method, the rest is its message."""
    if not data:
        return
    method = METHODS[data[0] % len(METHODS)]
    kind = input_of(method)
    try:
        asked = kind.FromString(data[1:])
    except DecodeError:
        return
    if isinstance(asked, pb.WatchRequest):
        asked.end = True
        asked.history = asked.history or not asked.since
    state = world.make()
    plan = Plan(state)
    servicer = make_control(state)

    async def run() -> None:
        context = cast(Any, Context())
        handler = getattr(servicer, method.name)
        try:
            if method.client_streaming:
                await handler(_pieces(cast(pb.AnnounceRequest, asked)), context)
            elif method.server_streaming:
                async with asyncio.timeout(0.05):
                    async for reply in handler(asked, context):
                        reply.SerializeToString()
            else:
                (await handler(asked, context)).SerializeToString()
        except (Aborted, TimeoutError):
            pass

    with (
        mock.patch.object(sandboxops, "identify", _identify),
        mock.patch.object(sandboxops, "is_alive", lambda sandbox: True),
        mock.patch.object(interfaceops, "identify", _identify),
        mock.patch.object(interfaceops, "is_alive", lambda sandbox: True),
        mock.patch.object(errors, "_unexpected", _raise),
    ):
        LOOP.run_until_complete(run())
    assert servicer._uploading == 0
    world.look(state, plan)


async def _pieces(one: pb.AnnounceRequest) -> AsyncIterator[pb.AnnounceRequest]:
    if one.WhichOneof("part") == "lines":
        yield pb.AnnounceRequest(header=pb.AnnounceHeader(network="web"))
    yield one


def make_request(rng: random.Random) -> bytes:
    """For `request`."""
    index = rng.randrange(len(METHODS))
    kind = input_of(METHODS[index])
    return bytes([index]) + message(kind, rng, CONTROL).SerializeToString()


# Each with the words that it takes for sound, so that some are.
WORDS: list[tuple[Callable[[str], object], tuple[str, ...]]] = [
    (lambda word: notation.parse_name(word, "network"), ("web", "a-b", "A1")),
    (notation.parse_mac, ("02:00:5e:00:53:01", "02-00-5E-00-53-01")),
    (notation.parse_address, ("10.1.0.1", "fd00::1")),
    (notation.parse_subnet, ("10.1.0.0/24", "fd00::/64")),
    (lambda word: requests.parse_network("n", subnets=word.split(",")), ("10.1.0.0/24",)),
    (lambda word: requests.parse_network(word, gateways=["10.1.0.1"]), ("n",)),
    (
        lambda word: requests.parse_network("n", subnets=["10.1.0.0/24"], ip_ranges=[word]),
        ("10.1.0.64/26",),
    ),
    (lambda word: requests.parse_network("n", driver=word), ("overlay", "macvlan")),
    (lambda word: requests.parse_endpoint("n", addresses=word.split(",")), ("10.1.0.1",)),
    (lambda word: requests.parse_endpoint("n", labels={word: word}), ("a.b/c",)),
    (lambda word: requests.parse_endpoint("n", aliases=word.split(",")), ("a,b",)),
    (requests.parse_ifname, ("eth0",)),
    (lambda word: requests.parse_publish(80, 80, word, word), ("tcp", "udp")),
    (split_address, ("h1:7946", "[fd00::1]:7946", "fd00::1")),
    (lambda word: config.parse_listen(word, "metrics_listen"), ("127.0.0.1:9646", "[::1]:9646")),
    (parse_listen, ("0.0.0.0:53", "[::]:53")),
    (lambda word: calls.pairs((word,), "--label"), ("a=b", "a=")),
]


def parse_word(data: bytes) -> None:
    """A word of the command line: the first byte says what it is to be."""
    if data:
        parse, _ = WORDS[data[0] % len(WORDS)]
        parse(data[1:].decode(errors="surrogateescape"))


def make_word(rng: random.Random) -> bytes:
    """For `parse_word`."""
    index = rng.randrange(len(WORDS))
    return bytes([index]) + text(rng, WORDS[index][1] * 3).encode(errors="surrogateescape")


def announce(data: bytes) -> None:
    """The lines of an announce file, in two pieces; the bulk way and the careful one agree."""
    lines = data.split(b"\n")
    half = len(lines) // 2
    specs = requests.parse_lines(lines[:half], 1) + requests.parse_lines(lines[half:], half + 1)
    for spec in specs:
        again = requests.parse_endpoint(
            spec.name,
            addresses=[notation.format_address(address) for address in spec.addresses],
            mac=notation.format_mac(spec.mac),
            aliases=spec.aliases,
            labels=spec.labels,
        )
        assert again == spec


def make_lines(rng: random.Random) -> bytes:
    """For `announce`."""

    def value(sound: object) -> object:
        if rng.random() < 0.98:
            return sound
        return rng.choice((None, 1, -1.5, True, [], {}, ["x"], {"a": 1}, *TEXTS))

    lines = []
    for index in range(rng.randrange(1, 6)):
        line: dict[str, object] = {
            "name": value(f"ep-{index}"),
            "mac": value(f"02:00:5e:00:53:{index:02x}"),
            "addresses": value([f"10.1.0.{index}"] * rng.choice((1, 1, 2))),
        }
        if rng.random() < 0.3:
            line["aliases"] = value(["a", "b"])
        if rng.random() < 0.3:
            line["labels"] = value({"k": "v"})
        if rng.random() < 0.03:
            line[text(rng)] = number(rng)
        lines.append(json.dumps(line).encode())
    return b"\n".join(lines) + rng.choice((b"", b"\n", b"\n\n"))


_FILES = scratch()


def configure(data: bytes) -> None:
    """A file of settings; every second line is taken for the environment instead."""
    path = Path(_FILES.name, "agent.toml")
    lines = data.split(b"\n")
    path.write_bytes(b"\n".join(lines[::2]))
    words = [line.decode(errors="surrogateescape").partition("=") for line in lines[1::2]]
    environment = {f"VXMESH_{key.strip().upper()}": value for key, _, value in words}
    found = config.load({}, environment, path)
    assert isinstance(found.settings.port, int)


def make_settings(rng: random.Random) -> bytes:
    """For `configure`."""
    names = [field.name for field in dataclasses.fields(config.Settings)]
    lines = []
    for _ in range(rng.randrange(1, 8)):
        sound = rng.choice((
            '"h1"', "7946", "true", '["10.0.0.1:7946", "h2"]', "1.5", '"debug"', "1979-05-27",
            "{ a = 1 }", "nan", "inf", "-1", '"127.0.0.1:9"', '"/run/x"', "99999999999999999999",
        ))  # fmt: skip
        value = sound if rng.random() < 0.9 else json.dumps(text(rng))
        lines.append(f"{rng.choice(names) if rng.random() < 0.95 else text(rng)} = {value}")
        lines.append("")
        if rng.random() < 0.3:
            lines[-1] = f"{rng.choice(names)}={text(rng)}"
    return "\n".join(lines).encode(errors="surrogateescape")


def load_bed(data: bytes) -> None:
    """The testbed's own state."""
    path = Path(_FILES.name, "state.json")
    path.write_bytes(data)
    with mock.patch.object(bed, "directory_of", lambda prefix: Path(_FILES.name)):
        found = bed.load("vxm")
    assert found is not None
    assert all(isinstance(host, bed.HostState) for host in found.hosts)


def make_bed(rng: random.Random) -> bytes:
    """For `load_bed`."""
    hosts = [bed.HostState(f"h{n}", n, f"/run/m{n}", 7, 8, 9) for n in range(rng.randrange(3))]
    made = dataclasses.asdict(
        bed.State("vxm", rng.random() < 0.5, hosts=hosts, cuts=[("h1", "h2")])
    )
    for _ in range(rng.choice((0, 0, 1, 2))):
        made[rng.choice(list(made))] = rng.choice((None, 1, "x", [], {}, [1], ["a"], {"a": 1}))
    if hosts and rng.random() < 0.3 and isinstance(made["hosts"], list) and made["hosts"]:
        made["hosts"][0] = {"name": rng.choice((1, None, "x")), "number": 1}
    return json.dumps(made).encode()


def resolv_conf(data: bytes) -> None:
    """The host's resolv.conf, which others write."""
    assert len(parse_resolv_conf(data.decode(errors="replace"), 53)) <= 8


def make_resolv_conf(rng: random.Random) -> bytes:
    """For `resolv_conf`."""
    lines = []
    for _ in range(rng.randrange(12)):
        word = rng.choice(("nameserver", "nameserver", "search", "options", "#"))
        lines.append(f"{word} {text(rng, ('10.0.0.1', '::1', 'fe80::1%lo', '8.8.8.8'))}")
    return "\n".join(lines).encode(errors="surrogateescape")


TARGETS = [
    Target("control.requests", request, make_request, ()),
    Target("control.words", parse_word, make_word, weight=5),
    Target("control.announce", announce, make_lines, weight=4),
    Target("disk.settings", configure, make_settings, weight=2),
    Target("disk.testbed", load_bed, make_bed),
    Target("dns.resolv-conf", resolv_conf, make_resolv_conf, ()),
]
