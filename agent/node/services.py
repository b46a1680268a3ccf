"""Services: making, changing and removing them, and what is said of the health of endpoints here.

What stands opposite: core/servicecatalogue.py judges what several nodes wrote at once,
core/services.py says where a service leads; agent/operations.py has other nodes asked whether a
port is free there, and addresses donated when NeedSpace is raised.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import msgspec

from agent.core.servicecatalogue import SERVICES_MAX, ServiceConflict, meet
from agent.core.services import Row, taking
from agent.errors import Conflict, Exhausted, InUse, Invalid, NotFound, Unsupported
from agent.model import OVERLAY, Network, Node, Notice, Publish
from agent.node.endpoints import Endpoints
from agent.node.records import Recording, log
from agent.servicemodel import (
    BACKENDS_MAX,
    DNSRR,
    REASON_MAX,
    Chosen,
    Health,
    Service,
    Verdict,
    summed,
)
from agent.servicespec import ServiceSpec, check_whole, chosen
from agent.views import HEALTH, SERVICE, Change

TOLD_AT_ONCE = 50  # conflicts told one by one when many come at once


class Services(Endpoints):
    """The methods of a node that are about services."""

    def __init__(self, me: Node, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(me, clock, rng)
        self._told_services: set[ServiceConflict] = set()
        self._takes: dict[str, bool] = {}  # services that took connections once -> they do now

    # -- services --

    def create_service(self, spec: ServiceSpec) -> Service:
        """Make a service.

        NeedSpace if another node must donate an address first; Conflict or Exhausted say what is
        taken. Nothing is changed by a call that raises.
        """
        self.check_stays()
        check_whole(spec)
        network = self.find_network(spec.network)
        if network.driver != OVERLAY:
            raise Unsupported(
                f"service {spec.name}",
                f"cannot be in {network.name}, whose driver is {network.driver}",
                "Use an overlay network",
            )
        self._check_service_name(network, spec.name)
        if not self.services.has_room(self.me):
            raise Exhausted(
                "services",
                f"{SERVICES_MAX} of this node are there, and the others take no more",
                "Remove some, or create it on another node",
            )
        now = self.clock()
        service = Service(
            self._new_id(),
            spec.name,
            network.id,
            spec.mode,
            () if spec.mode == DNSRR else self._choose_vips(network, spec.vips),
            spec.ports,
            spec.selector,
            (),
            spec.affinity,
            spec.health,
            self._node_ids(spec.publish_on),
            spec.prefer_local,
            spec.all_unhealthy,
            spec.drain_timeout,
            spec.labels,
            now,
            self.me,
        )
        self.check_published(service)
        with Recording(self) as change:
            stamp = self.hybrid.next(now)
            service = msgspec.structs.replace(service, stamp=stamp, born=stamp)
            self._put(SERVICE + service.id, service)
            self._take_service(self.me, service, change)
        return service

    def update_service(
        self, ref: str, network: str, spec: ServiceSpec, fields: Sequence[str]
    ) -> Service:
        """Change the `fields` of a service to those of `spec`; as for `create_service`."""
        self.check_stays()
        old = self._written_service(ref, network)
        home = self.find_network(old.network)
        wanted = chosen(spec, fields)
        if "publish_on" in wanted:
            wanted["publish_on"] = self._node_ids(spec.publish_on)
        if "vips" in wanted:
            raise Invalid(f"service {old.name}", "keeps its address", "Make a new service")
        new = msgspec.structs.replace(old, **wanted)
        check_whole(
            ServiceSpec(
                new.name, home.id, new.mode, ports=new.ports, affinity=new.affinity,
                health=new.health, publish_on=new.publish_on,
            )
        )  # fmt: skip
        # Only what it did not publish before: a port that it lost must not stand in the way of all.
        self.check_published(self.preview(spec, ref, network, fields))
        return self._write_service(new)

    def remove_service(self, id: str) -> None:
        """Remove a service; NotFound if there is none."""
        service = self.find_service(id)
        with Recording(self) as change:
            # Who lost a name to it must not fall back to that now; its creator may be away.
            for loser in list(self.services.unsettled()):
                if any(loss.winner == service.id for loss in loser.lost):
                    self._write_service(loser)
            alone = self.services.writers(service.id) == {self.me}
            if alone and service.creator == self.me:
                self._delete(SERVICE + service.id)
                self._note_services(self.services.drop(self.me, service.id), change)
            else:
                written = self.services.written(service.id)
                assert written is not None
                self._write_service(msgspec.structs.replace(written, deleted=True))
            self.settle_services()

    def preview(
        self, spec: ServiceSpec, ref: str = "", network: str = "", fields: Sequence[str] = ()
    ) -> Service:
        """The published ports that a service would have, for a look whether they are free: a
        service that is not there. With `ref`, of an update."""
        if ref:
            old = self._written_service(ref, network)
            wanted = chosen(spec, fields)
            ports = spec.ports if "ports" in wanted else old.ports
            on = self._node_ids(spec.publish_on) if "publish_on" in wanted else old.publish_on
            had = [(p.protocol, p.published, p.published_at) for p in old.ports]
            held = set(had if on == old.publish_on else ())
            ports = tuple(p for p in ports if (p.protocol, p.published, p.published_at) not in held)
            id, name, home = old.id, old.name, old.network
        else:
            ports, on = spec.ports, self._node_ids(spec.publish_on)
            id, name, home = "", spec.name, self.find_network(spec.network).id
        return Service(
            id, name, home, spec.mode, (), ports, {}, (), 0.0, spec.health, on, False,
            spec.all_unhealthy, 0.0, {}, self.clock(), self.me,
        )  # fmt: skip

    # -- backends --

    def add_backend(self, ref: str, network: str, endpoint: str, weight: int | None) -> Service:
        """Name an endpoint as a backend, or change its weight; one that is drained no more is."""
        self.check_stays()
        service = self._written_service(ref, network)
        _, member = self.find_endpoint(endpoint, service.network)
        id = member.endpoint.id
        said = service.chosen(id)
        if weight is None:
            weight = said.weight if said else 1
        selected = service.selects(member.endpoint.labels)
        added = said.added if said and selected else not selected
        return self._say(service, Chosen(id, weight, added=added))

    def remove_backend(self, ref: str, network: str, endpoint: str) -> Service:
        """Take an endpoint that was named out of a service's backends."""
        self.check_stays()
        service = self._written_service(ref, network)
        id, name = self._backend(service, endpoint)
        if id in self._network_of:
            _, member = self.find_endpoint(id, service.network)
            if service.selects(member.endpoint.labels):
                raise InUse(
                    f"endpoint {name}",
                    f"is a backend of {service.name} by its labels",
                    "Drain it with 'vxmesh service backend drain', or change the selector",
                )
        kept = tuple(each for each in service.backends if each.endpoint != id)
        return self._write_service(msgspec.structs.replace(service, backends=kept))

    def drain_backend(self, ref: str, network: str, endpoint: str) -> Service:
        """Send no new connections to a backend; those that it has go on."""
        self.check_stays()
        service = self._written_service(ref, network)
        id, _ = self._backend(service, endpoint)
        said = service.chosen(id)
        if said and said.draining:
            return service
        draining = Chosen(
            id,
            said.weight if said else 1,
            draining=True,
            since=self.clock(),
            added=said.added if said else False,
        )
        return self._say(service, draining)

    def _backend(self, service: Service, ref: str) -> tuple[str, str]:
        """Id and name of a backend of a service; NotFound if it is none."""
        said = service.chosen(ref)
        if said and ref not in self._network_of:
            return ref, ref  # it is gone; what was said of it is not
        _, member = self.find_endpoint(ref, service.network)
        id = member.endpoint.id
        if service.id not in self.selection.services_of(id) and not service.chosen(id):
            raise NotFound(
                f"endpoint {member.endpoint.name}",
                f"is no backend of {service.name}",
                f"See 'vxmesh service inspect {service.name}'",
            )
        return id, member.endpoint.name

    def _say(self, service: Service, said: Chosen) -> Service:
        others = [each for each in service.backends if each.endpoint != said.endpoint]
        if len(others) >= BACKENDS_MAX:
            others = [each for each in others if each.endpoint in self._network_of]
        if len(others) >= BACKENDS_MAX:
            raise Exhausted(
                f"service {service.name}",
                f"has {len(others)} named backends",
                "Choose them with a selector instead",
            )
        backends = tuple(sorted([*others, said], key=lambda each: each.endpoint))
        return self._write_service(msgspec.structs.replace(service, backends=backends))

    def look_again(self, service: str) -> None:
        """A service (id) may lead elsewhere because time has passed."""
        with Recording(self) as change:
            change.led.add(service)

    # -- what stands in the way --

    def check_published(self, service: Service) -> None:
        """Conflict if a port that it publishes is another service's, or a sandbox's here."""
        for port in service.published:
            for other in self.services.publishing(port.protocol, port.published):
                if other.id == service.id:
                    continue
                if any(meet(service, port, other, theirs) for theirs in other.published):
                    raise Conflict(
                        f"port {port.published}/{port.protocol}",
                        f"is published by service {other.name} in network "
                        f"{self.catalogue.name(other.network)}",
                        "Choose another, or give each of them nodes of its own with --publish-on",
                    )
        if not service.publish_on or self.me in service.publish_on:
            for port in service.published:
                publish = Publish(port.published, port.target, port.protocol, port.published_at)
                holder = self.publisher(publish)
                if holder:
                    raise Conflict(
                        f"port {port.published}/{port.protocol}",
                        f"is published by {holder} on {self.node_name(self.me)}",
                        "Choose another, or publish the service on other nodes with --publish-on",
                    )

    def publisher(self, wanted: Publish) -> str:
        """The sandbox of this node that publishes a port; empty if there is none."""
        for sandbox in self.sandboxes.values():
            for held in sandbox.publishes:
                at = {held.host_address, wanted.host_address}
                same = (held.host_port, held.protocol) == (wanted.host_port, wanted.protocol)
                if same and (len(at) == 1 or "" in at):
                    return f"sandbox {sandbox.name}"
        return ""

    def check_publishes(self, publishes: Iterable[Publish]) -> None:
        """Conflict if a port that a sandbox is to publish here is a service's."""
        for wanted in publishes:
            for service in self.services.publishing(wanted.protocol, wanted.host_port):
                here = not service.publish_on or self.me in service.publish_on
                for port in service.published if here else ():
                    at = {port.published_at, wanted.host_address}
                    same = (port.published, port.protocol) == (wanted.host_port, wanted.protocol)
                    if same and (len(at) == 1 or "" in at):
                        raise Conflict(
                            f"port {wanted.host_port}/{wanted.protocol}",
                            f"is published by service {service.name}",
                            "Choose another",
                        )

    def _check_service_name(self, network: Network, name: str) -> None:
        where = f"in network {self.catalogue.name(network.id)}"
        if self.services.named(network.id, name):
            raise Conflict(f"service {name}", f"exists {where}", "Choose another name")
        members = self.members.get(network.id)
        if members is None:
            return
        for other in members.with_name(name):
            if other.node not in self.withdrawn:
                raise Conflict(
                    f"service {name}",
                    f"would have the name of an endpoint {where} on {self.node_name(other.node)}",
                    "Choose another name",
                )
        for other in members.all.values():
            if other.endpoint.aliases and name in other.endpoint.aliases:
                raise Conflict(
                    f"service {name}",
                    f"would have the name of an alias of endpoint {other.endpoint.name} {where}",
                    "Choose another name",
                )

    def _choose_vips(self, network: Network, wanted: tuple[bytes, ...]) -> tuple[bytes, ...]:
        members = self._members(network.id)
        for address in wanted:
            self._check_static(network, members, address)
        self._check_owned(network, wanted)
        found = list(wanted)
        for family, width in ((4, 4), (6, 16)):
            has = any((":" in s) == (family == 6) for s in network.subnets)
            if has and width not in {len(address) for address in wanted}:
                found.append(self._pick(network, family))
        return tuple(found)

    def _node_ids(self, refs: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({self.find_node(ref).id for ref in refs}))

    def _written_service(self, ref: str, network: str) -> Service:
        """A service as its record says, but for a name that it lost: what is written over it."""
        found = self.find_service(ref, network)
        written = self.services.written(found.id)
        assert written is not None
        return msgspec.structs.replace(written, name=found.name, lost=found.lost)

    # -- when two nodes wrote at once --

    def _write_service(self, service: Service) -> Service:
        """Write a service's record under our own origin, above the one that counts now."""
        with Recording(self) as change:
            counts = self.services.written(service.id)
            stamp = self.hybrid.next(self.clock(), counts.stamp if counts else 0)
            fresh = msgspec.structs.replace(service, stamp=stamp)
            self._put(SERVICE + service.id, fresh)
            self._take_service(self.me, fresh, change)
        return fresh

    def _take_service(self, origin: str, service: Service, change: Change) -> None:
        stamp = max(service.stamp, service.born)
        if not self.hybrid.receive(stamp, self.clock(), own=origin == self.me):
            self._ahead.setdefault(origin, False)
        super()._take_service(origin, service, change)

    def settle_services(self, quietly: bool = False) -> None:
        """Make last what this node is to make last, and tell of conflicts that are new.

        To be called inside a Recording, after services changed. `quietly` at start.
        """
        with Recording(self):
            for service in list(self.services.unsettled()):
                if service.creator == self.me or service.creator in self.inherited:
                    self._write_service(service)
            standing = self.services.conflicts()
            fresh = [] if quietly else sorted(standing - self._told_services)
            if len(fresh) > TOLD_AT_ONCE:
                message = f"{len(fresh)} conflicts of services; {TOLD_AT_ONCE} of them are told"
                self.tell("service.conflict", message, count=str(len(fresh)))
            for conflict in fresh[:TOLD_AT_ONCE]:
                self.tell(
                    "service.conflict",
                    self.describe_service_conflict(conflict),
                    service=conflict.loser,
                    what=conflict.what,
                    value=conflict.value,
                    **{"with": conflict.winner},
                )
            self._told_services = standing

    def describe_service_conflict(self, conflict: ServiceConflict) -> str:
        """A sentence for people."""
        loser, winner = (self.services.get(id) for id in (conflict.loser, conflict.winner))
        if not loser or not winner:
            return ""
        if conflict.what == "name":
            return (
                f"{loser.name} was called {conflict.value}, which the older {winner.id} is called"
            )
        return f"{conflict.what} {conflict.value} of {loser.name} is the older {winner.name}'s"

    def leave_network(self, network: str) -> None:
        """A network was removed elsewhere while we wrote of services in it: take those along."""
        for service in self.services.of(network):
            written = self.services.written(service.id)
            if written and self.me in self.services.writers(service.id):
                self._write_service(msgspec.structs.replace(written, deleted=True))

    # -- health --

    def tell_health(self, endpoint: str, state: str, reason: str = "") -> None:
        """The runtime says how an endpoint of this node is: healthy, unhealthy, or "" to take
        back what it said."""
        health = self._own_health(endpoint)
        if (health.told, health.told_reason) == (state, reason):
            return
        since = self.clock() if state != health.told else health.told_since
        told = msgspec.structs.replace(
            health, told=state, told_since=since, told_reason=reason[:REASON_MAX]
        )
        self._write_health(told)

    def note_verdicts(self, endpoint: str, verdicts: Iterable[Verdict]) -> None:
        """What the checks of services say of an endpoint of this node, all of them."""
        health = self._own_health(endpoint)
        found = tuple(sorted(verdicts, key=lambda verdict: verdict.service))
        if found != health.verdicts:
            self._write_health(msgspec.structs.replace(health, verdicts=found))

    def _own_health(self, endpoint: str) -> Health:
        network = self.network_of(endpoint)
        member = self.members[network].all.get(endpoint) if network else None
        if member is None:
            raise NotFound(f"endpoint {endpoint}", "does not exist")
        if member.node != self.me:
            raise InUse(
                f"endpoint {member.endpoint.name}",
                f"lives on {self.node_name(member.node)}",
                "Tell its health there",
            )
        return self.health_of(member) or Health(endpoint, "", 0.0)

    def _write_health(self, health: Health) -> None:
        id, now = health.endpoint, self.clock()
        fresh = summed(health, now)
        with Recording(self) as change:
            if fresh:
                self._put(HEALTH + id, fresh)
            else:
                self._delete(HEALTH + id)
            self._take_health(self.me, id, fresh, change)
            if (fresh.state if fresh else "") != health.state:
                self._tell_health_changed(health, fresh)

    def _tell_health_changed(self, before: Health, now: Health | None) -> None:
        member = self.members[self.network_of(before.endpoint)].all[before.endpoint]
        name, network = member.endpoint.name, self.catalogue.name(member.endpoint.network)
        state, was = now.state if now else "unknown", before.state or "unknown"
        why = f" ({now.reason})" if now and now.reason else ""
        message = f"{name} in {network} is {state}{why}; it was {was}"
        self.tell("health.changed", message, endpoint=before.endpoint, network=network, state=state)

    # -- what follows from a change --

    def _close(self, change: Change) -> None:
        for each in change.endpoints:
            old = each.old
            if old and each.new is None and old.node == self.me:
                key = HEALTH + old.endpoint.id
                if self._health.pop((old.endpoint.id, self.me), None):
                    change.own.append(self.replica.delete(key))
        super()._close(change)
        for id in change.led:
            notice = self._note_refusing(id)
            if notice:
                change.notices.append(notice)

    def _note_refusing(self, id: str) -> Notice | None:
        """The notice if a service that took connections has no backend for them any more, or
        has one again."""
        service = self.services.get(id)
        if service is None:
            self._takes.pop(id, None)
            return None
        found = self.backends_of(service, self.clock())
        takes, before = bool(taking(service, found)), self._takes.get(id)
        if takes or before is not None:
            self._takes[id] = takes
        if before is None or takes == before:
            return None  # one that is new has none yet: no news
        fields = {"service": service.name, "network": self.catalogue.name(service.network)}
        if takes:
            message = f"service {service.name} has backends that take connections again"
            log.info("service.up", message=message, **fields)
            return Notice("service.up", message, fields)
        why = f"of {len(found)}, {_census(found)}" if found else "there is none"
        message = f"service {service.name} has no backend that takes connections: {why}"
        log.warning("service.down", message=message, **fields)
        return Notice("service.down", message, fields)


def _census(rows: Sequence[Row]) -> str:
    """How many backends are why none takes connections, for people."""
    counts = {
        "unhealthy": sum(row.health == "unhealthy" and not row.is_gone for row in rows),
        "not looked at yet": sum(row.health == "unknown" and not row.is_gone for row in rows),
        "draining": sum(row.draining and not row.is_gone for row in rows),
        "on lost nodes": sum(row.is_gone for row in rows),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none is"
