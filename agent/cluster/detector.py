"""Failure detection on the wire: pings over gRPC, rumours on pings and streams.

The one thin piece of asyncio around core/membership.py, which decides; what it decides becomes
the node's statuses, on which rows and names rest. A ping goes over a channel of its own, so
that no batch of records stands before it. When it fails, a bare TCP connect tells a dead agent
from a dead host: who refuses, or accepts and then does not answer, is a host that lives.
What stands opposite: server.py of another node answers; peers.py has the streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from math import inf
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog

from agent.cluster.calls import clamp
from agent.cluster.channels import Channels, knock
from agent.cluster.codec import Rumours, encode_rumours, rumours_from_proto, rumours_to_proto
from agent.cluster.dialer import Dialer, Distrusted
from agent.core.bounds import INCARNATION_MAX
from agent.core.membership import (
    Ask,
    Membership,
    Outcome,
    Probe,
    Rumour,
    State,
    Transition,
    Tuning,
)
from agent.errors import Invalid
from agent.model import Node
from agent.node import NodeState
from agent.rpc import peer_pb2 as pb
from agent.views import Change, Status

log = structlog.get_logger()

DIFFERS = 3  # pings with another table, until the whole of it is told
FAREWELLS = 32  # who are asked for an answer when this node leaves; the rest hears of it
FAREWELL_WITHIN = 1.0  # s; for them to answer
FAREWELL_AGAIN = 0.05  # s; after a ping that failed
KNOCK_AFTER = 1 / 3  # of a ping's time: then see whether the host itself answers

_STATES = {
    State.ALIVE: "alive",
    State.SUSPECT: "suspect",
    State.REFUSED: "unreachable",
    State.DEAD: "unreachable",
    State.LEFT: "left",
}
_NOTICES = {
    State.ALIVE: "member.alive",
    State.SUSPECT: "member.suspect",
    State.REFUSED: "member.unreachable",
    State.DEAD: "member.dead",
    State.LEFT: "member.left",
}


class Stream(Protocol):
    """What is needed of a stream to a peer."""

    def post(self, data: bytes) -> None:
        """Send these bytes soon."""

    @property
    def last_heard(self) -> float:
        """When its last message came, on the monotonic clock."""


class Detector:
    """This node's view of who is there. `incarnation` must be above that of its last life."""

    def __init__(
        self,
        node: NodeState,
        tuning: Tuning,
        incarnation: int,
        streams: Callable[[], Mapping[str, Stream]],
        dialer: Dialer,
    ) -> None:
        self.node = node
        self.membership = Membership(
            node.me, incarnation, tuning, random.Random(), time.monotonic()
        )
        self.on_change: list[Callable[[], None]] = []  # somebody came, went or is to be asked
        self.on_answered: list[Callable[[float], None]] = []  # a probe was, after so many s
        self._streams = streams
        self._told: dict[str, int] = {}  # node -> the incarnation that it gave itself
        self._taken: dict[str, float] = {}  # node -> last_heard of its stream, as last looked at
        self._differs: dict[str, int] = {}  # node -> pings running on which its table was another
        self._dialer = dialer
        self._channels = Channels(dialer)
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._due = -inf  # when `_run` wakes by itself
        self._stopped = False

    async def start(self) -> None:
        """Begin to probe."""
        self.node.listeners.append(self._changed)
        for id in list(self.node.nodes):
            self._add(id)
        self._recall()
        self._spawn(self._run())

    def _recall(self) -> None:
        """Who counted as gone before the restart does so until it answers."""
        now = time.monotonic()
        for id, status in self.node.status.items():
            if status.withdrawn:
                state = State.LEFT if status.state == _STATES[State.LEFT] else State.DEAD
                rumour = Rumour(id, status.incarnation, state, self.node.me)
                self.membership.receive([rumour], now)
        self.membership.transitions()  # that is no news

    async def stop(self) -> None:
        """Probe no more. Nobody is told: a stop is not a leave."""
        self._stopped = True
        self.node.listeners.remove(self._changed)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channels.close()

    def live(self) -> set[str]:
        """The ids of the nodes that count as there, this one included."""
        return set(self.membership.live())

    async def leave(self) -> None:
        """Tell that this node goes, on every stream. The others pass it on.

        A ping that is answered, which says it too, shows that it has arrived before the streams
        end: from those with a stream, and where nodes are few from all.
        """
        self.membership.leave(time.monotonic())
        data = encode_rumours(self.membership.table())
        streams = self._streams()
        for stream in streams.values():
            stream.post(data)
        self._flush()
        live = [self.node.nodes[id] for id in self.live() if id in self.node.nodes]
        live.sort(key=lambda node: (node.id not in streams, node.id))
        await asyncio.gather(*(self._say_farewell(node) for node in live[:FAREWELLS]))

    async def _say_farewell(self, node: Node) -> None:
        deadline = time.monotonic() + FAREWELL_WITHIN
        while (left := deadline - time.monotonic()) > 0:
            if isinstance(await self._ping_once(node, left), pb.PingReply):
                return
            await asyncio.sleep(FAREWELL_AGAIN)

    # -- what streams tell --

    def stream_changed(self, peer: str) -> None:
        """A stream to `peer` has come up or gone."""
        stream = self._streams().get(peer)
        if stream:
            stream.post(encode_rumours(self.membership.table()))
        else:
            # Its host may have died with it, or its agent alone: ask at once.
            self.membership.hasten(peer, time.monotonic())
        self._flush()

    def take(self, peer: str, rumours: Sequence[Rumour]) -> None:
        """Rumours that came from `peer` itself, on a stream or with a ping."""
        now = time.monotonic()
        known = self.node.nodes
        rumours = [r for r in rumours if r.node in known]  # of others there is no record yet
        for rumour in rumours:
            own = rumour.node == peer and rumour.state is State.ALIVE
            if own and rumour.incarnation <= INCARNATION_MAX:
                self._told[peer] = max(self._told.get(peer, 0), rumour.incarnation)
        self.membership.receive(rumours, now)
        if peer in known and peer in self._told:
            self.membership.heard(peer, self._told[peer], now)
        for rumour in rumours:
            if rumour.state is State.ALIVE and rumour.node != self.node.me:
                self._first_seen(rumour.node)
        self._flush()

    # -- the loop --

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            now = time.monotonic()
            if now >= self.membership.next_timer():
                self._hear_streams(now)
                self.membership.handle_timer(now)
                self._carry_out()
            self._due = self.membership.next_timer()
            wait = self._due - time.monotonic()
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with
            # what it waits for, and `stop` would wait for ever.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(wait, 0.001)):
                    await self._wake.wait()

    def _hear_streams(self, now: float) -> None:
        for id, stream in self._streams().items():
            if id in self._told and stream.last_heard > self._taken.get(id, 0.0):
                self._taken[id] = stream.last_heard
                self.membership.heard(id, self._told[id], stream.last_heard)

    def _flush(self) -> None:
        """Something came in: carry out what follows; the next timer may be due sooner for it."""
        self._carry_out()
        if self.membership.next_timer() < self._due:
            self._wake.set()

    def _carry_out(self) -> None:
        """What the membership wants now; nothing when streams end after `stop`."""
        if self._stopped:
            return
        for action in self.membership.actions():
            self._spawn(self._probe(action) if isinstance(action, Probe) else self._ask(action))
        for transition in self.membership.transitions():
            self._note(transition)
        streams = self._streams()
        targets, rumours = self.membership.gossip(time.monotonic(), list(streams))
        if targets:
            data = encode_rumours(rumours)
            for target in targets:
                streams[target].post(data)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("detector.failed", error=repr(task.exception()))

    # -- who there is --

    def _changed(self, change: Change) -> None:
        for id in change.nodes:
            if id in self.node.nodes:
                self._add(id)
            elif id != self.node.me:
                self.membership.forget(id)
                self._told.pop(id, None)
                self._differs.pop(id, None)
        if change.nodes:
            self._wake.set()

    def _add(self, id: str) -> None:
        if id != self.node.me:
            self.membership.add(id, time.monotonic())

    def _first_seen(self, id: str) -> None:
        """Somebody is there of whom nothing was known; not news, unlike a return."""
        if id not in self.node.status and self.membership.state(id) is State.ALIVE:
            status = Status("alive", "", self.node.clock(), False, self._told.get(id, 0))
            self.node.set_status(id, status)
            self._tell_change()

    def _note(self, transition: Transition) -> None:
        id, state = transition.node, transition.after
        if id == self.node.me or id not in self.node.nodes:
            return
        withdrawn = state in (State.DEAD, State.LEFT)
        reason = transition.reason if state not in (State.ALIVE, State.LEFT) else ""
        if state is State.REFUSED:
            reason = f"agent: {reason}" if reason else "agent"
        status = Status(
            _STATES[state], reason, self.node.clock(), withdrawn, transition.incarnation
        )
        self.node.set_status(id, status)
        name = self.node.node_name(id)
        message = f"{name} is {status.state}" + (f" ({reason})" if reason else "")
        if state is State.LEFT:
            message = f"{name} left the cluster"
        self.node.tell(_NOTICES[state], message, node=id, name=name, reason=reason)
        self._tell_change()

    def _tell_change(self) -> None:
        for told in self.on_change:
            told()

    # -- probing --

    async def _probe(self, probe: Probe) -> None:
        def host_answers() -> None:
            self.membership.host_answers(probe.seq, time.monotonic())

        begin = time.monotonic()
        outcome, incarnation = await self.ping(
            probe.target, probe.timeout, host_answers=host_answers
        )
        now = time.monotonic()
        if outcome is Outcome.ACK:
            for told in self.on_answered:
                told(now - begin)
            self._told[probe.target] = max(self._told.get(probe.target, 0), incarnation)
            self.membership.acked(probe.seq, incarnation, now)
            self._first_seen(probe.target)
        elif outcome is Outcome.REFUSED:
            self.membership.refused(probe.seq, now)
        self._flush()

    async def _ask(self, ask: Ask) -> None:
        await asyncio.gather(*(self._ask_one(ask, helper) for helper in ask.helpers))

    async def _ask_one(self, ask: Ask, helper: str) -> None:
        request = pb.PingForRequest(node=self.node.me, target=ask.target, seconds=ask.timeout * 0.8)
        try:
            node = self.node.nodes.get(helper)
            if node is None:
                return
            stub = self._channels.stub(node)
            reply: pb.PingForReply = await stub.PingFor(request, timeout=ask.timeout)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            if isinstance(error, grpc.aio.AioRpcError):
                self._dialer.heed(error, helper)
            self._channels.drop(helper)
            return  # no nack either: perhaps it is we who are slow (Lifeguard)
        outcome = {0: Outcome.ACK, 1: Outcome.REFUSED}.get(reply.outcome, Outcome.SILENT)
        self.membership.answered(ask.seq, helper, outcome, time.monotonic())
        self._flush()

    async def ping(
        self,
        target: str,
        timeout: float,
        host_answers: Callable[[], None] = lambda: None,
    ) -> tuple[Outcome, int]:
        """Whether the agent of `target` answers within `timeout` s; and its incarnation.

        `host_answers` is called as soon as its host took a connection. If its agent then says
        nothing that is SILENT all the same: it may only be busy.
        """
        node = self.node.nodes.get(target)
        if node is None:
            return Outcome.SILENT, 0
        begin = time.monotonic()
        pinging = asyncio.ensure_future(self._ping_once(node, timeout))
        try:
            await asyncio.wait({pinging}, timeout=timeout * KNOCK_AFTER)
            reply = pinging.result() if pinging.done() else Outcome.SILENT
            if reply is Outcome.SILENT:
                knocked = await knock(node, begin + timeout - time.monotonic())
                if knocked is None:
                    host_answers()
                reply = await pinging
        finally:
            pinging.cancel()
        if reply is Outcome.SILENT:
            return knocked or Outcome.SILENT, 0
        if isinstance(reply, Outcome):
            return reply, 0
        try:
            rumours = sound_rumours(reply)
        except Invalid as error:
            log.warning("peer.refused", peer=target, error=str(error))
            return Outcome.SILENT, 0
        self.take(target, rumours)
        self._compare(target, reply.table)
        return Outcome.ACK, reply.incarnation

    async def _ping_once(self, node: Node, timeout: float) -> pb.PingReply | Outcome:
        """The answer; REFUSED if another agent lives there now, or one that cannot show whose it
        is; SILENT if there is none."""
        request = pb.PingRequest(
            node=self.node.me,
            incarnation=self.membership.incarnation,
            target=node.id,
            rumours=rumours_to_proto(self._tell(node.id)),
            table=self.membership.digest(),
        )
        try:
            stub = self._channels.stub(node)
            reply: pb.PingReply = await stub.Ping(request, timeout=timeout)
            return reply if reply.node == node.id else Outcome.REFUSED
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            # A new channel the next time: this one's connection may have backed off for long.
            self._channels.drop(node.id)
            if isinstance(error, grpc.aio.UsageError):
                return Outcome.SILENT
            meant = self._dialer.heed(error, node.id)
            return Outcome.REFUSED if isinstance(meant, Distrusted) else Outcome.SILENT

    def _compare(self, id: str, table: int) -> None:
        """What a peer knows of all, as a hash: news on its way differs once, what was lost again
        and again."""
        if table == self.membership.digest():
            self._differs.pop(id, None)
        else:
            self._differs[id] = self._differs.get(id, 0) + 1

    def _tell(self, id: str) -> Sequence[Rumour]:
        """What to put on a message to `id`: news, or everything if it lacks some."""
        if self._differs.get(id, 0) >= DIFFERS:
            self._differs[id] = 0
            return self.membership.table()
        return self.membership.piggyback(id)

    def answer(self, request: pb.PingRequest) -> pb.PingReply:
        """What a peer that pings is told; Invalid if it says what cannot be."""
        rumours = sound_rumours(request)
        if request.node in self.node.nodes:
            self._told[request.node] = max(self._told.get(request.node, 0), request.incarnation)
            self.take(request.node, rumours)
            self._compare(request.node, request.table)
            self._first_seen(request.node)
        return pb.PingReply(
            node=self.node.me,
            incarnation=self.membership.incarnation,
            rumours=rumours_to_proto(self._tell(request.node)),
            table=self.membership.digest(),
        )

    async def answer_for(self, request: pb.PingForRequest) -> pb.PingForReply:
        """Ping somebody on behalf of a peer."""
        seconds = clamp(request.seconds, 0.01, 10.0)
        outcome, incarnation = await self.ping(request.target, seconds)
        number = {Outcome.ACK: 0, Outcome.REFUSED: 1, Outcome.SILENT: 2}[outcome]
        return pb.PingForReply(outcome=number, incarnation=incarnation)


def sound_rumours(message: pb.PingRequest | pb.PingReply) -> Rumours:
    """The rumours of a ping; Invalid if it says what cannot be."""
    if message.incarnation > INCARNATION_MAX:
        raise Invalid("ping", f"has incarnation {message.incarnation}", "")
    return rumours_from_proto(message.rumours)
