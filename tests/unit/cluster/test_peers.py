"""Agents' peer halves in one process, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import grpc.aio
import pytest

from agent.cluster import link as link_module
from agent.cluster import peers as peers_module
from agent.cluster import recheck
from agent.cluster import server as server_module
from agent.cluster.codec import delta_to_proto
from agent.cluster.dialer import Dialer
from agent.cluster.link import Impostor
from agent.cluster.outside import find_refusal
from agent.cluster.peers import Peers
from agent.cluster.reach import Reach
from agent.cluster.refusals import Reason
from agent.cluster.server import SYNC
from agent.cluster.trust import Keyring
from agent.core.replica import Delta, Record
from agent.core.topology import neighbours
from agent.model import Node
from agent.node import NodeState
from agent.requests import parse_network
from agent.rpc import peer_pb2 as pb
from agent.rpc import peer_pb2_grpc as pb_grpc
from agent.views import Status
from tests.directories import run_dir
from tests.identities import DAY, authority
from tests.ports import free_port
from tests.unit.cluster.portclock import PortClock

WITHIN = 60.0  # s; a machine may be busy


async def until(check: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WITHIN
    while not check():
        assert time.monotonic() < deadline, f"not within {WITHIN:.0f} s: {what}"
        await asyncio.sleep(0.02)


class Agent:
    """A node with its streams, and without a kernel: what comes is applied at once."""

    def __init__(self, index: int, everybody: int, life: float) -> None:
        self.id = f"{index:016x}"
        node = Node(self.id, f"n{index}", "127.0.0.1", free_port(), "127.0.0.1", 4789, "t", 0, 1500)
        self.me = node
        self.state = NodeState(node, time.time, random.Random(index))
        self.applies = True
        self.everybody = everybody
        self.run_dir = run_dir()
        self.keyring = Keyring(authority().credentials(self.id, 0.0, life))
        self.peers = self.again(f"boot{index}")
        self.state.listeners.append(self._changed)
        self.state.describe(node)

    def again(self, boot: str) -> Peers:
        return Peers(
            self.state, self.me, boot, self._durable, self.keyring, self.run_dir, self.everybody
        )

    def renew(self, life: float) -> None:
        self.keyring.replace(authority().credentials(self.id, 0.0, life))

    async def stop(self) -> None:
        await self.peers.stop()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.peers.me.port}"

    async def _durable(self) -> None:
        pass

    def _changed(self, change: object) -> None:
        self.state.replica.publish(self.state.replica.written())
        if self.applies:
            self.state.kernel_has(self.state.versions())
        asyncio.get_running_loop().call_soon(self.peers.wake)

    def make(self, name: str) -> int:
        self.state.create_network(parse_network(name))
        return self.state.replica.written()

    def names(self) -> set[str]:
        return {self.state.catalogue.name(n.id) for n in self.state.catalogue.all()}


class Late(Exception):
    """The certificates that agents began with have ended before all was as it should."""


async def begun(agents: list[Agent], check: Callable[[], bool]) -> None:
    """Wait until agents are as they should, with the certificates that they have."""
    ends = min(agent.keyring.current.not_after for agent in agents)

    def holds() -> bool:
        if time.time() >= ends:
            raise Late
        return check()

    await until(holds, "all know all, and have streams")


@contextlib.asynccontextmanager
async def running(count: int, everybody: int, life: float = DAY) -> AsyncIterator[list[Agent]]:
    """Agents that were told of the first one only, once all know all. `life` is what they have
    certificates for, in s."""
    agents = [Agent(index + 1, everybody, life) for index in range(count)]
    for agent in agents:
        await agent.peers.start([agents[0].target] if agent is not agents[0] else [])
    try:
        await begun(agents, lambda: all(len(a.state.nodes) == count for a in agents))
        yield agents
    finally:
        for agent in agents:
            await agent.stop()


async def lacking(
    agent: Agent, version: int, expected: dict[str, str], networks: Sequence[str] = ()
) -> None:
    """Wait until a wait of `agent` ends with just these that lack what it wrote, and why. A first
    wait may end before a busy machine has brought it to the others."""
    seconds = 0.5
    while (found := await agent.peers.wait_applied(version, seconds, networks)) != expected:
        assert seconds < WITHIN, found
        seconds *= 2


def wanted(agents: list[Agent], everybody: int) -> dict[str, set[str]]:
    """The streams that there should be, as each end sees them."""
    ids = [agent.id for agent in agents]
    links: dict[str, set[str]] = {id: set() for id in ids}
    for id in ids:
        for other in neighbours(id, ids, everybody):
            links[id].add(other)
            links[other].add(id)
    return links


async def test_few_have_streams_to_all() -> None:
    async with running(4, everybody=30) as agents:
        await until(lambda: all(len(a.peers.links) == 3 for a in agents), "all streams are up")
        version = agents[2].make("net")
        assert await agents[2].peers.wait_applied(version, WITHIN) == {}
        assert all(agent.names() == {"net"} for agent in agents)


async def test_many_have_streams_to_some_and_records_reach_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers_module, "KEEP_UNWANTED", 0.5)
    monkeypatch.setattr(peers_module, "TIDY_INTERVAL", 0.1)
    async with running(10, everybody=3) as agents:
        links = wanted(agents, 3)
        # Those to the seed are closed again by who opened them, where nobody wants them.
        await until(
            lambda: all(set(a.peers.links) == links[a.id] for a in agents), "streams as they should"
        )
        assert any(len(others) < 9 for others in links.values())
        version = agents[7].make("net")
        # Far nodes are asked; that they have it means that it was relayed.
        assert await agents[7].peers.wait_applied(version, WITHIN) == {}
        assert all(agent.names() == {"net"} for agent in agents)
        assert await agents[7].peers.catch_up(WITHIN) == []
        assert agents[7].peers.missing() == 0


async def test_a_wait_names_the_far_node_whose_kernel_lacks_it() -> None:
    async with running(8, everybody=3) as agents:
        links = wanted(agents, 3)
        writer, far = next(
            (a, b) for a in agents for b in agents if a is not b and b.id not in links[a.id]
            and b is not agents[0] and a is not agents[0]
        )  # fmt: skip
        far.applies = False
        version = writer.make("net")
        await lacking(writer, version, {far.id: ""})
        # And it is told as soon as the kernel there has it.
        waiting = asyncio.create_task(writer.peers.wait_applied(version, WITHIN))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        far.state.kernel_has(far.state.versions())
        far.peers.wake()
        assert await waiting == {}


async def test_only_the_live_are_waited_for_and_streams_follow_them() -> None:
    async with running(5, everybody=30) as agents:
        gone = agents[4]
        await until(lambda: all(len(a.peers.links) == 4 for a in agents), "all streams are up")
        gone.applies = False
        version = agents[0].make("net")
        await lacking(agents[0], version, {gone.id: ""})
        live = [agent.id for agent in agents if agent is not gone]
        agents[0].peers.live = lambda: live
        agents[0].peers.membership_changed()
        assert await agents[0].peers.wait_applied(version, WITHIN) == {}
        # It is held for dead, and dialled all the same: it may come back.
        assert gone.id in agents[0].peers.links


async def test_one_whose_agent_alone_is_dead_is_waited_for_until_it_is_withdrawn() -> None:
    async with running(3, everybody=30) as (one, two, down):
        await until(lambda: all(len(a.peers.links) == 2 for a in (one, two, down)), "all are up")
        one.peers.live = lambda: [one.id, two.id]
        await down.peers.stop()
        await until(lambda: down.id not in one.peers.links, "its stream is gone")
        one.state.set_status(down.id, Status("unreachable", "agent", 0.0))
        version = one.make("net")
        await lacking(one, version, {down.id: ""})
        # Its kernel has the change as soon as its agent is back.
        waiting = asyncio.create_task(one.peers.wait_applied(version, WITHIN))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        down.peers = down.again("boot again")
        await down.peers.start([])
        assert await waiting == {}
        await down.peers.stop()
        down.peers = down.again("boot that never is")
        await until(lambda: down.id not in one.peers.links, "its stream is gone again")
        version = one.make("another")
        waiting = asyncio.create_task(one.peers.wait_applied(version, WITHIN))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        one.state.set_status(down.id, Status("unreachable", "silent", 0.0, withdrawn=True))
        assert await waiting == {}


async def test_who_loses_its_stream_during_a_wait_is_asked() -> None:
    async with running(3, everybody=30) as (one, two, three):
        await until(lambda: all(len(a.peers.links) == 2 for a in (one, two, three)), "all are up")
        one.peers.live = lambda: [one.id, two.id, three.id]
        three.applies = False
        version = one.make("net")
        waiting = asyncio.create_task(one.peers.wait_applied(version, WITHIN))
        await until(lambda: three.names() == {"net"}, "it was told")
        for agent in (one, three):  # and nobody makes a new stream
            agent.peers._wanted.clear()
        for agent, other in ((one, three), (three, one)):
            agent.peers.links[other.id].close()
        await until(lambda: three.id not in one.peers.links, "the stream is gone")
        three.state.kernel_has(three.state.versions())
        three.peers.wake()
        assert await waiting == {}
        assert three.id not in one.peers.links


async def test_who_comes_during_a_wait_is_waited_for_too() -> None:
    async with running(3, everybody=30) as (one, two, late):
        await until(lambda: all(len(a.peers.links) == 2 for a in (one, two, late)), "all are up")
        live = [one.id, two.id]
        one.peers.live = lambda: live
        two.applies = late.applies = False
        version = one.make("net")
        waiting = asyncio.create_task(one.peers.wait_applied(version, WITHIN))
        await until(lambda: two.names() == late.names() == {"net"}, "both were told")
        live.append(late.id)
        two.state.kernel_has(two.state.versions())
        two.peers.wake()
        told = one.peers.links[two.id].session
        await until(lambda: told.peer_applied >= version, "it has it")
        await asyncio.sleep(0.3)  # it looks again three times
        assert not waiting.done()
        late.state.kernel_has(late.state.versions())
        late.peers.wake()
        assert await waiting == {}


@pytest.mark.parametrize("everybody", [30, 3], ids=["by a stream", "asked"])
async def test_what_is_in_a_networks_way_holds_up_just_that_one(everybody: int) -> None:
    async with running(8 if everybody == 3 else 2, everybody) as agents:
        links = wanted(agents, everybody)
        one = agents[1]
        is_far = everybody == 3
        held = next(a for a in agents if a is not one and (a.id not in links[one.id]) == is_far)
        version = one.make("web")
        held.state.kernel_withholds({"w" * 16: "VNI 4100 is taken by device vxlan9"})
        held.peers.wake()
        assert await one.peers.wait_applied(version, WITHIN, ["a" * 16]) == {}
        assert await one.peers.wait_applied(version, WITHIN) == {}
        why = "VNI 4100 is taken by device vxlan9"
        await lacking(one, version, {held.id: why}, ["a" * 16, "w" * 16])
        waiting = asyncio.create_task(one.peers.wait_applied(version, WITHIN, ["w" * 16]))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        held.state.kernel_withholds({})
        held.peers.wake()
        assert await waiting == {}


async def test_an_agent_that_was_away_is_found_again() -> None:
    async with running(3, everybody=30) as agents:
        await until(lambda: all(len(a.peers.links) == 2 for a in agents), "all streams are up")
        await agents[0].peers.stop()
        await until(lambda: agents[0].id not in agents[1].peers.links, "it was noticed")
        agents[1].make("meanwhile")
        again = agents[0].again("boot again")
        agents[0].peers = again
        await again.start([])
        await until(lambda: "meanwhile" in agents[0].names(), "it was told what it missed")
        await until(lambda: all(len(a.peers.links) == 2 for a in agents), "all streams are up")


async def test_a_redial_opens_new_streams_in_place_of_doubtful_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "STALE", 600.0)
    monkeypatch.setattr(link_module, "SILENCE", 600.0)
    async with running(2, everybody=30) as agents:
        one, two = (agent.peers for agent in agents)
        await until(lambda: one.links and two.links, "the stream is up")
        before = one.links[agents[1].id], two.links[agents[0].id]
        # Its end is not noticed: as if the cable had been pulled and put back.
        for link in before:
            link.session.receive = lambda message, now: None  # type: ignore[method-assign]
        one.redial()
        await until(
            lambda: (
                {id(link) for p in (one, two) for link in p.links.values()}.isdisjoint(
                    id(link) for link in before
                )
                and one.links
                and two.links
            ),
            "a new stream stands",
        )
        agents[0].make("after")
        await until(lambda: agents[1].names() == {"after"}, "it works")


async def test_one_that_is_wanted_again_is_dialled_again() -> None:
    async with running(2, everybody=30) as (a, b):
        # Which b may have dialled, before a comes to think of it.
        await until(lambda: b.id in a.peers.links and b.id in a.peers._dialers, "a stream")
        dialler = a.peers._dialers[b.id][1]
        a.peers._wanted.clear()  # while it stands
        a.peers.links[b.id].close()
        # A busy machine may have it wanted again before that is seen.
        await until(lambda: dialler.done() or b.id in a.peers._wanted, "nobody dials")
        a.peers.membership_changed()
        await until(lambda: not a.peers._dialers[b.id][1].done(), "it is dialled")


async def test_a_port_is_waited_for_until_it_answers() -> None:
    port = free_port()
    reach = Reach()
    waiting = asyncio.create_task(reach.answers(f"127.0.0.1:{port}"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)
    await asyncio.wait_for(waiting, WITHIN)
    server.close()
    await server.wait_closed()


async def test_a_redial_ends_every_pause() -> None:
    reach = Reach()
    waiting = [asyncio.create_task(reach.wait(600.0)) for _ in range(3)]
    await asyncio.sleep(0)
    reach.redial()
    await asyncio.wait_for(asyncio.gather(*waiting), WITHIN)


async def test_many_dead_nodes_share_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    async def probe(target: str) -> bool:
        nonlocal made
        made += 1
        return False

    monkeypatch.setattr("agent.cluster.reach._probe", probe)
    reach = Reach()
    waiting = [asyncio.create_task(reach.answers(f"h{n}:1")) for n in range(100)]
    started = time.monotonic()
    await asyncio.sleep(1.0)
    most = 100 + 60 * (time.monotonic() - started)  # each once, and then 50 a second
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert 100 <= made <= most


CLAIMED = f"{2:016x}"
CLAIMS = [
    ("Ping", pb.PingRequest(node=CLAIMED)),
    ("PingFor", pb.PingForRequest(node=CLAIMED, target=f"{1:016x}", seconds=0.1)),
    ("RequestSpace", pb.SpaceRequest(network="n", requester=CLAIMED, family=4)),
    ("AgreeRemoval", pb.RemovalAsk(remover=CLAIMED, lost=[f"{3:016x}"])),
    ("AgreeRemoval", pb.RemovalAsk(remover=CLAIMED, lost=[f"{3:016x}"], release=True)),
    ("Deliver", pb.Delivery(node=CLAIMED, delta=pb.Delta(origin=CLAIMED, upto=9))),
]


@pytest.mark.parametrize(("method", "claim"), CLAIMS)
async def test_no_node_can_ask_in_the_name_of_another(method: str, claim: Any) -> None:
    async with running(2, everybody=30) as (a, b):
        before = a.state.versions()
        nine = Dialer(b.state, authority().keyring("9" * 16))
        channel = nine.channel(a.me)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
            await getattr(stub, method)(claim, timeout=30)
        await channel.close()
        assert find_refusal(error.value) is Reason.IMPOSTOR
        assert a.peers.refusals.counts["impostor"] == 1
        assert a.state.versions() == before
        assert not a.state.removing.remover(f"{3:016x}", time.time())


@pytest.mark.parametrize(
    "first",
    [pb.PeerMessage(hello=pb.Hello(node=CLAIMED, boot="b", version="1", name="n2"))],
    ids=["hello"],
)
async def test_no_node_can_open_a_stream_in_the_name_of_another(first: pb.PeerMessage) -> None:
    async with running(2, everybody=30) as (a, b):
        await until(lambda: b.id in a.peers.links, "a stream")
        link = a.peers.links[b.id]
        channel = Dialer(b.state, authority().keyring("9" * 16)).channel(a.me)
        stream: Any = channel.stream_stream(SYNC)()
        await stream.write(first.SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as error:
            while await stream.read() is not grpc.aio.EOF:
                pass
        await channel.close()
        assert find_refusal(error.value) is Reason.IMPOSTOR
        assert a.peers.links[b.id] is link and not link.closed.is_set()
        assert a.peers.refusals.counts["impostor"] == 1


LARGE = bytes(8 << 20)  # longer on its way than it takes to look


async def test_a_stream_ends_though_something_is_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC refused the end, and who called waited for ever."""
    monkeypatch.setattr(server_module, "TAKES_WITHIN", WITHIN)
    given_up = asyncio.Event()

    async def accept(_requests: object, write: Callable[[bytes], Any], _caller: object) -> None:
        writing = asyncio.ensure_future(write(LARGE))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        given_up.set()
        raise Impostor("1" * 16)

    async with running(1, everybody=30) as (a,), asyncio.timeout(WITHIN):
        monkeypatch.setattr(a.peers.server, "_accept", accept)
        channel = Dialer(a.state, authority().keyring("9" * 16)).channel(a.me)
        stream: Any = channel.stream_stream(SYNC)()
        await given_up.wait()
        assert await stream.read() == LARGE
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream.read()
        assert find_refusal(error.value) is Reason.IMPOSTOR
        await channel.close()


async def test_nothing_is_taken_from_who_has_not_said_who_it_is() -> None:
    async with running(2, everybody=30) as (a, b):
        nine = "9" * 16
        channel = Dialer(b.state, authority().keyring(nine)).channel(a.me)
        stream: Any = channel.stream_stream(SYNC)()
        delta = delta_to_proto(Delta(nine, 0, 1, [Record("n/x", 1, b"")]))
        await stream.write(pb.PeerMessage(delta=delta).SerializeToString())
        while await stream.read() is not grpc.aio.EOF:
            pass
        await channel.close()
        assert a.state.version(nine) == 0 and nine not in a.peers.links


def streams(agents: list[Agent]) -> set[int]:
    return {id(link) for agent in agents for link in agent.peers.links.values()}


async def all_have_all(agents: list[Agent]) -> None:
    most = len(agents) - 1
    await begun(agents, lambda: all(len(a.peers.links) == most for a in agents))


class CountedEvent(asyncio.Event):
    waits = 0

    async def wait(self) -> Literal[True]:
        self.waits += 1
        return await super().wait()


async def test_who_keeps_a_stream_that_is_heard_again_lets_others_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers_module, "GRACE", 0.01)
    async with running(2, everybody=30) as agents:
        await all_have_all(agents)
        # Who dialled it is busy with carrying it; the other one waits for it to fall silent.
        [link] = [one for agent in agents for one in agent.peers.links.values() if not one.dialed]
        # As its watch leaves it when the loop was held up, and then it was heard.
        before, counted = link.stale, CountedEvent()
        link.stale = counted
        counted.set()
        link.session.heard = time.monotonic()
        before.set()
        await until(lambda: counted.waits, "it has seen that, and waits anew")
        assert counted.waits == 1
        assert not link.ended.is_set()


def have_shown(agents: list[Agent], ends: float) -> bool:
    """Whether all that have a stream have shown who took it a certificate that ends so late."""
    shown = [c for agent in agents for c in agent.peers.server._front._shown.values()]
    return all(certificate.not_valid_after_utc.timestamp() >= ends for certificate in shown)


async def test_streams_outlive_the_certificates_with_which_they_were_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recheck, "WITHIN", 0.1)
    clock = PortClock(monkeypatch)
    async with running(3, everybody=30) as agents:
        await all_have_all(agents)
        before = streams(agents)
        for days in range(2, 7):  # each lasts a day longer than the one before
            for agent in agents:
                agent.renew(days * DAY)
            ends = min(agent.keyring.current.not_after for agent in agents)
            await until(lambda ends=ends: have_shown(agents, ends), "it is shown")  # type: ignore[misc]
            await clock.advance(DAY, connections=3)
        agents[1].make("later")
        await until(lambda: all(a.names() == {"later"} for a in agents), "it went round")
        assert streams(agents) == before
        assert not any(sum(a.peers.refusals.counts.values()) for a in agents)


async def test_a_node_whose_certificate_ends_is_cut_off_in_both_directions() -> None:
    for life in (3.0, 10.0, 40.0):  # s; the first will do, on all but a very busy machine
        with contextlib.suppress(Late):
            await is_cut_off_in_both_directions(life)
            return
    raise AssertionError("no certificate was long enough")


async def is_cut_off_in_both_directions(life: float) -> None:
    async with running(3, everybody=30, life=life) as agents:
        await all_have_all(agents)
        # Of its two streams it has opened one, and the other one was opened to it.
        both = {True, False}
        late = next(a for a in agents if {x.dialed for x in a.peers.links.values()} == both)
        rest = [agent for agent in agents if agent is not late]
        for agent in rest:
            agent.renew(60.0)
        await until(lambda: not late.peers.links, "it is cut off")
        version = late.make("unheard")
        rest[0].make("heard")
        await until(lambda: rest[1].names() == {"heard"}, "the rest goes on")
        assert late.names() == {"unheard"}
        assert all(agent.state.version(late.id) < version for agent in rest)
        assert sum(agent.peers.refusals.counts["expired"] for agent in rest)
        late.renew(60.0)
        await until(lambda: late.names() == {"heard", "unheard"}, "it is let in again")


async def test_why_a_stream_ended_is_told_by_its_reader_not_by_a_write_that_came_too_late() -> None:
    class Ended:
        async def write(self, data: bytes) -> None:
            raise asyncio.InvalidStateError("RPC already finished.")

    call: Any = Ended()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await peers_module.writer_to(call)(b"a digest")
