"""New endpoints at a few hosts, while everything else goes on.

Most are in the host's own network, with addresses that it owns; some in another one, whose owner
has to donate addresses first, and some in a new network: claims and networks travel with them.
What stands opposite: nodes.py has the records, run of whole.py says when.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.allocator import with_space
from agent.core.addresses import Range
from agent.core.replica import Delta
from agent.errors import Unavailable
from agent.model import Network
from agent.requests import parse_endpoint, parse_network
from tests.sim.large.host import Host
from tests.sim.large.peers import LinkedHost, Peers
from tests.sim.large.sizes import size_of

ANSWER_WITHIN = 2.0  # s; then the owner of addresses counts as silent
FOREIGN, FRESH = 4, 9  # which of ten writes are in another's network, and in a new one


class _Answer:
    """Something that a coroutine waits for on the virtual clock."""

    def __init__(self) -> None:
        self.work: Coroutine[Any, Any, None] | None = None
        self.over = False

    def __await__(self) -> Generator[_Answer, str | None, str | None]:
        return (yield self)

    def give(self, refused: str | None) -> None:
        """The owner's answer; None if there was none. Only the first counts."""
        if not self.over:
            self.over = True
            assert self.work is not None
            drive(self.work, refused)


def drive(work: Coroutine[Any, Any, None], value: str | None = None) -> None:
    """Run a coroutine until it waits or ends."""
    try:
        work.send(value).work = work
    except StopIteration:
        pass


class Donors:
    """Asks other hosts for addresses, as Peers.request_space of the agent does."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    async def request_space(
        self, owner: str, network: Network, family: int, ranges: list[Range]
    ) -> str:
        host, answer = self.peers.host, _Answer()
        world = host.world
        to = world.hosts[owner]
        request = (network.id, family, ranges, self.peers.state.version(owner), answer)
        world.exchange(host, to, self._asked(to), request, 60, None)
        world.at(world.now + ANSWER_WITHIN, lambda a, b: answer.give(None))
        refused = await answer
        if refused is None:
            raise Unavailable(f"node {owner}", "does not answer")
        return refused

    def _asked(self, to: Host) -> Callable[[Host, Any], None]:
        assert isinstance(to, LinkedHost)
        owner = to.peers

        def asked(asker: Host, request: Any) -> None:
            network, family, ranges, known, answer = request
            refused = owner.state.donate(network, asker.id, family, ranges)
            delta = owner.state.state_of(known)
            size = size_of(delta)
            to.world.exchange(to, asker, self._answered, (refused, delta, answer), size, None)

        return asked

    def _answered(self, owner: Host, reply: tuple[str, Delta, _Answer]) -> None:
        refused, delta, answer = reply
        if not refused:
            self.peers.state.merge(delta, owner.id)
            self.peers.mesh.spread(owner.id, None, owner.world.now)
            self.peers.pass_on()
        answer.give(refused)


@dataclass
class Write:
    """A new endpoint, and how it came to be known. Times in virtual s."""

    origin: str
    version: int
    at: float
    first: bool  # that this host wrote since the start: its tree has to grow
    known: dict[str, float] = field(default_factory=dict)  # host -> s after it was written


class Load:
    """Writes, one by one."""

    def __init__(self, networks: Sequence[str]) -> None:
        self.networks = networks
        self.writes: list[Write] = []
        self.failed: list[str] = []
        self._begun = 0
        self._by_origin: dict[str, list[Write]] = {}

    def write(self, peers: Peers) -> None:
        """Begin to make an endpoint at a host."""
        self._begun += 1
        drive(self._write(peers, self._begun - 1))

    async def _write(self, peers: Peers, number: int) -> None:
        state, world = peers.state, peers.host.world
        if number % 10 == FRESH:
            network = state.create_network(parse_network(f"new{number}")).id
        elif number % 10 == FOREIGN:
            network = world.rng.choice(self.networks)
        else:
            network = next(id for id, held in state.members.items() if held.local)
        spec = parse_endpoint(f"w{number}")
        try:
            await with_space(state, Donors(peers), lambda: state.create_endpoint(network, spec))
        except Unavailable as error:
            self.failed.append(str(error))
            return
        before = self._by_origin.setdefault(state.me, [])
        write = Write(state.me, state.version(state.me), world.now, not before)
        before.append(write)
        self.writes.append(write)

    def arrived(self, host: str, origin: str, before: int, after: int, now: float) -> None:
        """A host has got an origin's versions before < v <= after."""
        for write in self._by_origin.get(origin, ()):
            if before < write.version <= after:
                write.known[host] = now - write.at
