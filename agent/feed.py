"""What the name server of this host is told: the networks that sandboxes here are in.

Only those, with all their endpoints wherever they live: a host is not to hold names that
nobody on it may ask for. What stands opposite: resolver/, in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import dns.rdatatype

from agent.core.explaining import explain
from agent.core.members import Member
from agent.core.names import Answer, Kind, Names, Srv, subject_of
from agent.core.nametables import ServiceBackend, ServicePort
from agent.core.question import parse_question, reverse_prefix
from agent.core.services import taking
from agent.errors import Invalid
from agent.model import Network
from agent.node import NodeState
from agent.notation import format_address
from agent.resolver.client import ResolverClient
from agent.resolver.feed import Batch, ServiceRow, State, View
from agent.rpc import control_pb2 as pb
from agent.servicemodel import Service
from agent.sights import Sights
from agent.views import Change

TTL = 5


class ToResolver:
    """Feeds the name server, and asks it for the command line."""

    def __init__(self, node: NodeState, run_dir: Path, netns: Path, workers: int = 1) -> None:
        self.node = node
        self._fed: set[str] = set()  # network ids
        self._told: dict[bytes, View] = {}
        self._sights = Sights(node)
        self._client = ResolverClient(run_dir, str(netns), self._snapshot, workers=workers)

    async def start(self) -> None:
        """Find the running name server or start one; Unavailable if there can be none."""
        self.node.listeners.append(self._changed)
        await self._client.connect_or_spawn()

    async def stop(self) -> None:
        """Leave the name server to itself: names go on resolving while the agent is away."""
        self.node.listeners.remove(self._changed)
        await self._client.close()

    async def counters(self) -> dict[str, int]:
        """The name server's own counters; Unavailable if it does not answer."""
        return (await self._client.stats()).counters

    async def settle(self) -> None:
        """Return when what has changed so far is in force."""
        await self._client.flush()

    # -- feeding --

    def _shown(self, id: str) -> Network:
        network = self.node.catalogue.get(id)
        assert network is not None
        return network

    def _snapshot(self) -> State:
        self._sights.renew()
        self._fed, self._told = self._sights.networks, self._sights.views.copy()
        return State(
            [self._shown(id) for id in self._fed],
            [m.endpoint for id in self._fed for m in self._living(id)],
            list(self._told.values()),
            [self._row(s) for id in self._fed for s in self.node.services.of(id)],
        )

    def _row(self, service: Service) -> ServiceRow:
        """What is answered about a service at this moment."""
        rows = taking(service, self.node.backends_of(service, self.node.clock()))
        ports = dict.fromkeys((p.protocol, p.port, p.target) for p in service.ports)
        return ServiceRow(
            service.network,
            service.id,
            service.name,
            service.vips,
            tuple(ServiceBackend(row.endpoint.id, row.weight) for row in rows),
            tuple(ServicePort(*port) for port in ports),
        )

    def _living(self, network: str) -> list[Member]:
        """The endpoints of a network, without those of nodes that count as gone."""
        gone = self.node.withdrawn
        return [m for m in self.node.members[network].all.values() if m.node not in gone]

    def _changed(self, change: Change) -> None:
        batch = Batch()
        before = self._fed
        if change.sandboxes or change.networks or any(
            (m.endpoint.sandbox and m.node == self.node.me)
            for c in change.endpoints for m in (c.old, c.new) if m
        ):  # fmt: skip
            self._refresh(change, batch)
        for each in change.endpoints:
            network, old, new = each.network, each.old, each.new
            if network not in self._fed or network not in before:
                continue
            if new and new.node not in self.node.withdrawn:
                batch.put(new.endpoint)
            elif old or new:
                batch.drop(network, (old or new).endpoint.id)  # type: ignore[union-attr]
        for id in change.led:
            self._lead(id, change.services.get(id), batch, before)
        for id, status in change.statuses.items():
            if (status is not None and status.withdrawn) != (id in self.node.withdrawn):
                self._flip(id, batch, before)
        if len(batch):
            self._client.send(batch)

    def _lead(self, id: str, was: Service | None, batch: Batch, before: set[str]) -> None:
        """A service may lead elsewhere, or nowhere any more."""
        service = self.node.services.get(id)
        found = service or was
        if found is None or found.network not in self._fed or found.network not in before:
            return
        if service:
            batch.put_service(self._row(service))
        else:
            batch.drop_service(found.network, id)

    def _flip(self, node: str, batch: Batch, before: set[str]) -> None:
        """A node was withdrawn, or is there again: so are its names."""
        gone = node in self.node.withdrawn
        for network, member in self.node.endpoints_of(node):
            if network not in self._fed or network not in before:
                continue
            if gone:
                batch.drop(network, member.endpoint.id)
            else:
                batch.put(member.endpoint)

    def _refresh(self, change: Change, batch: Batch) -> None:
        changed = self._sights.changed(change)
        fed, views = self._sights.networks, self._sights.views
        for id in self._fed - fed:
            batch.drop_network(id)
        for id in fed:
            if id not in self._fed or id in change.networks:
                batch.put_network(self._shown(id))
            if id not in self._fed:
                for member in self._living(id):
                    batch.put(member.endpoint)
                for service in self.node.services.of(id):
                    batch.put_service(self._row(service))
        for address in changed:
            view = views.get(address)
            if self._told.get(address) == view:
                continue
            if view is None:
                del self._told[address]
                batch.drop_view(address)
            else:
                self._told[address] = view
                batch.put_view(address, view.networks, view.place)
        self._fed = fed

    # -- asking --

    async def resolve(self, name: str, type: str, networks: list[str]) -> pb.ResolveReply:
        """What a sandbox in just these networks (ids) is answered, and why."""
        types = [type] if type else ["A", "AAAA"]
        reply = pb.ResolveReply()
        for each in types:
            kind, records, why = await self._ask(name, each, networks)
            if not reply.result or kind == "answer":
                reply.result = kind
            for line in why:
                if line not in reply.why:
                    reply.why.append(line)
            for record in records:
                label, _, data = record.partition(" ")
                reply.records.add(name=name, type=label, ttl=TTL, data=data)
        return reply

    async def _ask(
        self, name: str, type: str, networks: list[str]
    ) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        if set(networks) <= self._fed:
            verdict = await self._client.query(name, type, networks=tuple(networks))
            return verdict.kind, verdict.records, verdict.why
        # No sandbox here is in that network, so the name server was not told of it.
        try:
            number = int(dns.rdatatype.from_text(type))
        except Exception:
            raise Invalid(f"type {type[:20]!r}", "is unknown", "Use A, AAAA, PTR or SRV") from None
        question = parse_question(name, number)
        names = Names()
        prefix = reverse_prefix(question.labels)
        address = prefix.address if prefix else None
        for id in networks:
            network = self._shown(id)
            names.put_network(id, network.name, network.subnets, network.internal)
            label = question.labels[subject_of(question.labels)] if question.labels else ""
            meant = self.node.services.named(id, label)
            if address and not meant:
                meant = self.node.services.with_address(id, address)
            backends: set[str] = set()
            if meant:
                row = self._row(meant)
                names.put_service(id, row.id, row.name, row.vips, row.backends, row.ports)
                backends = {backend.endpoint for backend in row.backends}
            members = self.node.members.get(id)
            for member in self._living(id) if members else ():
                held = member.endpoint
                is_meant = label == held.name or label in held.aliases or held.id in backends
                if is_meant or address in held.addresses:
                    names.put(id, held.id, held.name, held.aliases, held.addresses)
        view = tuple(networks)
        answer: Answer = names.answer(question, view)
        lines = tuple(
            f"{dns.rdatatype.to_text(dns.rdatatype.RdataType(r.type))} {_text(r.data)}"
            for r in (answer.records if answer.kind is Kind.ANSWER else ())
        )
        return answer.kind.name.lower(), lines, tuple(explain(names, question, view))


def _text(data: bytes | str | Srv) -> str:
    """A record's data, for people."""
    if isinstance(data, Srv):
        return f"{data.priority} {data.weight} {data.port} {data.target}"
    return format_address(data) if isinstance(data, bytes) else data
