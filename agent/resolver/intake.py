"""The resolver's half of the feed: takes in the agent's state and answers its questions.

A full state is built aside while names go on resolving from the old one, and a connection that
breaks leaves the state as it is: that is how names outlive the agent. Only the connection that
sent the last `Reset` may change anything, so that an agent that was replaced cannot.
What stands opposite: client.py.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import dns.exception
import dns.message
import dns.rdatatype
import msgspec

from agent.core.explaining import explain
from agent.core.names import Answer, Kind, Names
from agent.core.question import Question, parse_question
from agent.errors import Invalid, VxmeshError
from agent.notation import shorten
from agent.resolver import feed
from agent.resolver.forward import Forwarder
from agent.resolver.messages import describe, read
from agent.resolver.rooms import Rooms
from agent.resolver.server import Server
from agent.resolver.wire import Asked
from agent.resolver.workers import Workers

_STREAM_BYTES = 1 << 20

_log = logging.getLogger("vxmesh.resolver.intake")


class Intake:
    """Serves the feed's socket. `on_stop` is called once when the resolver should end."""

    def __init__(
        self,
        path: Path,
        setup: str,
        server: Server,
        forwarder: Forwarder,
        on_stop: Callable[[], None],
        on_replaced: Callable[[], None] | None = None,
        workers: Workers | None = None,
    ) -> None:
        """`on_replaced` is called once when an agent of another build or setup has come.

        What is fed goes on to `workers`, and is in force when it is so there too.
        """
        self._workers = workers or Workers()
        self.path = path
        self._setup = setup
        self._server = server
        self._forwarder = forwarder
        self._on_stop = on_stop
        self._on_replaced = on_replaced or on_stop
        self._rooms = Rooms(server)
        self._feeder: asyncio.StreamWriter | None = None
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; whatever lies at the path is a leftover, as the caller holds the lock."""
        self.path.unlink(missing_ok=True)
        mask = os.umask(0o177)  # between bind and chmod anybody could connect
        try:
            self._listener = await asyncio.start_unix_server(
                self._converse, str(self.path), limit=_STREAM_BYTES
            )
        finally:
            os.umask(mask)

    async def close(self) -> None:
        """No more feeds; the socket goes first, so that nobody finds a resolver that ends."""
        if self._listener is not None:  # else what is at the path is another one's by now
            self.path.unlink(missing_ok=True)
            self._listener.close()
            self._listener = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def leave(self) -> None:
        """Close the sockets that are in sandboxes: before the server is."""
        self._rooms.close()

    async def serve(self, sock: socket.socket) -> None:
        """Take what the first process hands on, until it ends; that of a worker."""
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_STREAM_BYTES)
        await self._converse(reader, writer)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._take(reader, writer)
        except (EOFError, OSError):
            pass
        except (ValueError, msgspec.MsgspecError) as error:
            _log.error("feed malformed", extra={"fields": {"error": str(error)}})
        finally:
            if self._feeder is writer:
                self._feeder = None
                _log.info("feed lost", extra={"fields": self._server.names.counts()})
            writer.close()
            self._tasks.discard(task)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        aside: Names | None = None
        views: dict[bytes, feed.View] = {}  # of the state that is built aside
        greeted = False
        while True:
            payload = await feed.read_frame(reader)
            message = feed.to_resolver_decoder.decode(payload)
            if isinstance(message, feed.Hello):
                greeted = message.protocol == feed.PROTOCOL and message.setup == self._setup
                welcome = feed.Welcome(feed.PROTOCOL, greeted, os.getpid(), self._setup)
                writer.write(feed.frame(welcome))
                await writer.drain()
                if not greeted:
                    fields = {"asked": message.setup, "protocol": message.protocol}
                    _log.warning("agent of another setup: giving way", extra={"fields": fields})
                    if feed.namespace_of(message.setup) == feed.namespace_of(self._setup):
                        self._on_replaced()
                    else:  # ours is to go: nobody who asks is in it any more
                        self._on_stop()
                    return
            elif not greeted:
                raise ValueError("no hello")
            elif isinstance(message, feed.Reset):
                aside, views = Names(), {}
                self._feeder = writer
                await self._workers.forward(payload, confirmed=False)
            elif isinstance(message, feed.Query):
                self._spawn(self._query(message), writer)
            elif isinstance(message, feed.StatsQuery):
                self._spawn(self._stats(message), writer)
            elif isinstance(message, feed.Stop):
                _log.info("told to stop", extra={"fields": {}})
                self._on_stop()
                return
            elif self._feeder is not writer:
                raise ValueError("another agent feeds this resolver now")
            elif isinstance(message, feed.Changes):
                _apply(message, self._server.names if aside is None else aside)
                if aside is None:
                    self._server.changed()
                    await self._rooms.alter(message.dropped_views, message.views)
                else:
                    views.update((view.address, view) for view in message.views if view.place)
                await self._workers.forward(payload, confirmed=bool(message.seq))
                if message.seq:
                    writer.write(feed.frame(feed.Done(message.seq)))
                # Reading what is already here does not wait: give the askers their turn.
                await asyncio.sleep(0)
            else:
                if aside is None:
                    raise ValueError("a commit without a reset")
                self._server.names, aside = aside, None
                await self._rooms.replace(views.values())
                await self._workers.forward(payload, confirmed=True)
                await self._server.start()
                writer.write(feed.frame(feed.Done(message.seq)))
                _log.info("state taken", extra={"fields": self._server.names.counts()})
                # What is there now stays: without this the collector walks all of it again
                # and again, tens of milliseconds each time at 100,000 names. Nothing in it is
                # a cycle, so a state that is replaced is freed all the same.
                gc.freeze()

    def _spawn(self, work: Awaitable[feed.ToAgent], writer: asyncio.StreamWriter) -> None:
        async def run() -> None:
            reply = await work
            if not writer.is_closing():
                writer.write(feed.frame(reply))

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _query(self, query: feed.Query) -> feed.Verdict:
        names = self._server.names
        try:
            question, asked = _parse(query)
        except VxmeshError as error:
            failure = (error.code, error.what, error.why, error.fix)
            return feed.Verdict(query.id, "", (), (), failure)
        view = names.view(query.address) if query.address else query.networks
        answer: Answer = names.answer(question, view)
        why = explain(names, question, view)
        records = tuple(describe(answer.records))
        if answer.kind is Kind.FORWARD:
            message, upstream = await self._forwarder.resolve(asked)
            if message is None:
                why.append("no resolver of the host gave an answer (SERVFAIL)")
            else:
                why.append(f"{upstream} answered")
                records = tuple(
                    f"{dns.rdatatype.to_text(rrset.rdtype)} {rdata}"
                    for rrset in message.answer
                    for rdata in rrset
                )
        return feed.Verdict(query.id, answer.kind.value, records, tuple(why))

    async def _stats(self, query: feed.StatsQuery) -> feed.Stats:
        total = await self._workers.counters()
        for more in (self._server.counters, self._forwarder.counters):
            total.update(more)
        counters = {
            **total,
            **self._server.names.counts(),
            "workers": 1 + len(self._workers),
        }
        upstreams = tuple(upstream.text for upstream in self._forwarder.upstreams())
        return feed.Stats(query.id, os.getpid(), counters, upstreams)


def _parse(query: feed.Query) -> tuple[Question, Asked]:
    """The question that a person typed, and the same as if it had come by the wire."""
    try:
        type = dns.rdatatype.from_text(query.rdtype)
    except (dns.exception.DNSException, ValueError):
        raise Invalid(
            f"record type {shorten(query.rdtype)}", "is unknown", "Use A, AAAA, PTR, MX …"
        ) from None
    question = parse_question(query.name, int(type))
    text = ".".join(question.labels) + "."
    try:
        asked = read(dns.message.make_query(text, type).to_wire(), udp=False)
    except dns.exception.DNSException as error:
        raise Invalid(f"name {shorten(query.name)}", str(error)) from None
    if not isinstance(asked, Asked):
        raise Invalid(
            f"record type {query.rdtype}", "cannot be asked for", "Use A, AAAA, PTR, MX …"
        )
    return question, asked


def _apply(changes: feed.Changes, names: Names) -> None:
    for id in changes.dropped_networks:
        names.drop_network(id)
    for network in changes.networks:
        names.put_network(network.id, network.name, network.subnets, network.internal)
    for network_id, endpoint_id in changes.dropped:
        names.drop(network_id, endpoint_id)
    for row in changes.endpoints:
        names.put(row.network, row.id, row.name, row.aliases, row.addresses)
    for network_id, service_id in changes.dropped_services:
        names.drop_service(network_id, service_id)
    for service in changes.services:
        names.put_service(
            service.network,
            service.id,
            service.name,
            service.vips,
            service.backends,
            service.ports,
        )
    for address in changes.dropped_views:
        names.drop_view(address)
    for view in changes.views:
        names.put_view(view.address, view.networks)
