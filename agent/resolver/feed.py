"""The protocol by which the agent feeds the name server, on `<run-dir>/resolver.sock`.

A frame is four bytes of length, big-endian, and one msgpack message. The agent says `Hello`,
the resolver `Welcome`; one that does not fit (other protocol, other build, other sockets) says
so and ends, and the agent starts the right one. Then `Reset`, `Changes` …, `Commit` replace the
whole state at once at the commit, and `Changes` alone alter it; `Done` says what is in force.

Rows are agent.model's own structs, as they are stored and gossiped: the agent encodes what it
has anyway and copies nothing.
What stands opposite: client.py (the agent) and intake.py (the resolver).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from agent import __version__
from agent.core.nametables import ServiceBackend, ServicePort
from agent.model import Endpoint, Network

PROTOCOL = 3  # 2: services; 3: sandboxes to listen in
SOCKET = "resolver.sock"
LOCK = "resolver.lock"
EXIT_LOCKED = 75  # another resolver has this run-dir: EX_TEMPFAIL of sysexits.h

SERVICES_PER_FRAME = 50  # of ten backends each
ROWS_PER_FRAME = 500  # some 0.2 ms to encode and 1 ms to take in: nobody's loop waits longer
PIDS = 1 << 31  # pid_t is a signed integer of 32 bits
FRAME_BYTES_MAX = 64 << 20  # five hundred endpoints at their largest, and more


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A network namespace to listen in, as in agent.model.Sandbox."""

    netns: str
    inode: int
    pid: Annotated[int, Meta(ge=0, lt=PIDS)]  # 0: it ends with the path
    start_time: int


class View(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Who asks from this address is in these networks (ids); of one name in two the first wins.

    With a `place`, who asks from inside there; `address` is then just a key.
    """

    address: bytes  # 4 or 16
    networks: tuple[str, ...]
    place: Place | None = None


class ServiceRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is answered about a service; as in core.names.Names.put_service.

    `vips` (4 or 16 bytes each) are what NAME leads to; empty (dnsrr): NAME leads to the backends.
    `backends` are those that answers name, now: healthy and not draining (or all, if the service
    says so when none is healthy), by endpoint id and SRV weight (0 to 65535); their addresses
    and names are the endpoints' own, which are fed anyway. One that is not fed, or whose node is
    withdrawn, is in no answer. `ports`: protocol "tcp" or "udp", port, target, and a name for
    _NAME._tcp or "". With no backends at all the answer is NODATA, not NXDOMAIN.
    """

    network: str
    id: str
    name: str
    vips: tuple[bytes, ...] = ()
    backends: tuple[ServiceBackend, ...] = ()
    ports: tuple[ServicePort, ...] = ()


class State(NamedTuple):
    """All that the resolver should know. The sequences must not change while they are fed.

    Networks bear the name that they are shown under. Endpoints are those whose names should
    resolve, on whatever node; views are for the sandboxes of this node, one an address.
    """

    networks: Sequence[Network]
    endpoints: Sequence[Endpoint]
    views: Sequence[View]
    services: Sequence[ServiceRow] = ()


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The agent's first message. Its first field is for ever the protocol."""

    protocol: int
    setup: str


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """The resolver's first message; if not `accepted` it is about to end."""

    protocol: int
    accepted: bool
    pid: int
    setup: str


class Reset(msgspec.Struct, frozen=True, array_like=True, tag="reset"):
    """A full state follows; whoever sends this is the feeder from now on."""


class Changes(msgspec.Struct, frozen=True, array_like=True, tag="changes"):
    """Rows that are gone and rows that are new or changed; what is gone goes first.

    `seq`, if not 0, is sent back in `Done` once this is in force.
    """

    seq: int = 0
    dropped_networks: tuple[str, ...] = ()
    networks: Sequence[Network] = ()
    dropped: Sequence[tuple[str, str]] = ()  # network id, endpoint id
    endpoints: Sequence[Endpoint] = ()
    dropped_views: Sequence[bytes] = ()
    views: Sequence[View] = ()
    dropped_services: Sequence[tuple[str, str]] = ()  # network id, service id
    services: Sequence[ServiceRow] = ()


class Commit(msgspec.Struct, frozen=True, array_like=True, tag="commit"):
    """The full state is whole: it replaces the old one now."""

    seq: int


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """All up to the message with this `seq` is in force."""

    seq: int


class Query(msgspec.Struct, frozen=True, array_like=True, tag="query"):
    """What would you answer, and why? Asked as from `address` or, if empty, from `networks`."""

    id: int
    name: str
    rdtype: str
    address: bytes = b""
    networks: tuple[str, ...] = ()


class Verdict(msgspec.Struct, frozen=True, array_like=True, tag="verdict"):
    """The answer to a Query. `error` is (gRPC code, what, why, fix) if it could be none."""

    id: int
    kind: str  # answer, nodata, nxdomain, forward, refused
    records: tuple[str, ...]  # "A 10.1.0.2"
    why: tuple[str, ...]
    error: tuple[str, str, str, str] | None = None


class StatsQuery(msgspec.Struct, frozen=True, array_like=True, tag="stats?"):
    """How are you?"""

    id: int


class Stats(msgspec.Struct, frozen=True, array_like=True, tag="stats"):
    """Counters since the resolver started, and how much it knows."""

    id: int
    pid: int
    counters: dict[str, int]
    upstreams: tuple[str, ...]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """End the resolver."""


ToResolver = Hello | Reset | Changes | Commit | Query | StatsQuery | Stop
ToAgent = Welcome | Done | Verdict | Stats

_encoder = msgspec.msgpack.Encoder()
to_resolver_decoder = msgspec.msgpack.Decoder(ToResolver)
to_agent_decoder = msgspec.msgpack.Decoder(ToAgent)


def frame(message: ToResolver | ToAgent) -> bytearray:
    """The bytes of one message, length first."""
    buffer = bytearray(4)
    _encoder.encode_into(message, buffer, 4)
    buffer[:4] = (len(buffer) - 4).to_bytes(4, "big")
    return buffer


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """One message's bytes. EOFError at the end, ValueError if the length cannot be."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        if size > FRAME_BYTES_MAX:
            raise ValueError(f"a frame of {size} bytes")
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise EOFError("the far side closed the connection") from error


def setup_of(listen: Sequence[str], netns: str | None, workers: int = 1) -> str:
    """What both must agree on: the build, where to listen, how many processes, the namespace.

    The namespace is named by its inode: at the same path another one may be by now.
    """
    stat = Path(netns or "/proc/self/ns/net").stat()
    return f"{__version__} {','.join(listen)} {workers} {stat.st_dev}:{stat.st_ino}"


def namespace_of(setup: str) -> str:
    """The part of a setup that names the namespace."""
    return setup.rpartition(" ")[2]


class Batch:
    """Changes for the resolver, the last of each row only: twice changed is sent once.

    The methods are those of core.names.Names. A batch may be used again after it was sent.
    """

    __slots__ = ("dropped_networks", "endpoints", "networks", "services", "views")

    def __init__(self) -> None:
        self.dropped_networks: dict[str, None] = {}
        self.networks: dict[str, Network] = {}
        # By network, so that a network that goes takes the rows before it along. None: dropped.
        self.endpoints: dict[str, dict[str, Endpoint | None]] = {}
        self.services: dict[str, dict[str, ServiceRow | None]] = {}  # as endpoints
        self.views: dict[bytes, View | None] = {}

    def put_network(self, network: Network) -> None:
        """A network or what changed of it, under the name that it is shown under."""
        self.networks[network.id] = network

    def drop_network(self, id: str) -> None:
        """The network is gone and every name in it."""
        self.dropped_networks[id] = None
        self.networks.pop(id, None)
        self.endpoints.pop(id, None)
        self.services.pop(id, None)

    def put(self, endpoint: Endpoint) -> None:
        """An endpoint or what changed of it."""
        self.endpoints.setdefault(endpoint.network, {})[endpoint.id] = endpoint

    def drop(self, network_id: str, endpoint_id: str) -> None:
        """The endpoint is gone."""
        self.endpoints.setdefault(network_id, {})[endpoint_id] = None

    def put_service(self, service: ServiceRow) -> None:
        """A service or what changed of it: the whole row, in place of what was known of it.

        Call it when its VIPs, ports or name change, and whenever a backend becomes healthy or
        unhealthy, drains, comes or goes. In which order rows of endpoints, of the network and of
        the service come does not matter; a row for a network that is not fed costs memory and
        answers nobody. drop_network takes its services along.
        """
        self.services.setdefault(service.network, {})[service.id] = service

    def drop_service(self, network_id: str, service_id: str) -> None:
        """The service is gone. Nothing happens if there is none."""
        self.services.setdefault(network_id, {})[service_id] = None

    def put_view(
        self, address: bytes, networks: tuple[str, ...], place: Place | None = None
    ) -> None:
        """Who asks from `address`, or in `place`, is in `networks`."""
        self.views[address] = View(address, networks, place)

    def drop_view(self, address: bytes) -> None:
        """Nobody of this node has that address any more."""
        self.views[address] = None

    def merge(self, later: Batch) -> None:
        """Take what `later` says on top of what is here."""
        for id in later.dropped_networks:
            self.drop_network(id)
        self.networks.update(later.networks)
        for id, rows in later.endpoints.items():
            self.endpoints.setdefault(id, {}).update(rows)
        for id, services in later.services.items():
            self.services.setdefault(id, {}).update(services)
        self.views.update(later.views)

    def __len__(self) -> int:
        """How many rows it has."""
        rows = sum(map(len, self.endpoints.values())) + sum(map(len, self.services.values()))
        return len(self.dropped_networks) + len(self.networks) + rows + len(self.views)

    def changes(self) -> Iterator[Changes]:
        """The messages that say it, each of bounded size, in the order to send them in."""
        networks = self.networks.values()
        if self.dropped_networks or networks:
            yield Changes(dropped_networks=tuple(self.dropped_networks), networks=[*networks])
        rows = ((id, ep, row) for id, each in self.endpoints.items() for ep, row in each.items())
        while chunk := list(islice(rows, ROWS_PER_FRAME)):
            yield Changes(
                dropped=[(id, endpoint) for id, endpoint, row in chunk if row is None],
                endpoints=[row for _, _, row in chunk if row is not None],
            )
        services = ((id, s, row) for id, each in self.services.items() for s, row in each.items())
        while listed := list(islice(services, SERVICES_PER_FRAME)):
            yield Changes(
                dropped_services=[(id, service) for id, service, row in listed if row is None],
                services=[row for _, _, row in listed if row is not None],
            )
        views = iter(self.views.items())
        while some := list(islice(views, ROWS_PER_FRAME)):
            yield Changes(
                dropped_views=[address for address, view in some if view is None],
                views=[view for _, view in some if view is not None],
            )


def state_changes(state: State) -> Iterator[Changes]:
    """The messages between Reset and Commit."""
    for start in range(0, len(state.networks), ROWS_PER_FRAME):
        yield Changes(networks=state.networks[start : start + ROWS_PER_FRAME])
    for start in range(0, len(state.endpoints), ROWS_PER_FRAME):
        yield Changes(endpoints=state.endpoints[start : start + ROWS_PER_FRAME])
    for start in range(0, len(state.views), ROWS_PER_FRAME):
        yield Changes(views=state.views[start : start + ROWS_PER_FRAME])
    for start in range(0, len(state.services), SERVICES_PER_FRAME):
        yield Changes(services=state.services[start : start + SERVICES_PER_FRAME])
