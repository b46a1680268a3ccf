"""Networks: making and removing them, and the addresses of each that this node owns.

What stands opposite: core/catalogue.py decides when two nodes wrote at once, and what was
decided is made to last here; core/ring.py says who owns which addresses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import msgspec

from agent.core.addresses import Range
from agent.core.bounds import SEGMENTS_MAX
from agent.core.catalogue import NETWORKS_MAX, VNIS_CHOSEN, free_vni
from agent.core.catalogue import Conflict as Clash
from agent.core.clock import HybridClock
from agent.core.fill import Fill
from agent.core.overlaps import block
from agent.drivers import overlay
from agent.errors import Conflict, Exhausted, InUse, Invalid
from agent.lanmodel import LAN_DRIVERS
from agent.model import Network, Node, Notice, encode
from agent.node.records import Recording, Records, log
from agent.notation import format_address
from agent.requests import MTU_MIN_V6, NetworkSpec
from agent.subnets import check_subnets, choose_subnets, first_gateway
from agent.views import CLAIMS, NETWORK, Change

# Conflicts told one by one when many come at once: each is an event, and all are in `network ls`.
TOLD_AT_ONCE = 50


class Networks(Records):
    """The methods of a node that are about networks."""

    def __init__(self, me: Node, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(me, clock, rng)
        self.hybrid = HybridClock()
        self._told: set[Clash] = set()  # conflicts that the operator has been told of
        self._ahead: dict[str, bool] = {}  # nodes with a clock too far ahead to follow -> told
        self._fill: dict[str, Fill] = {}  # network -> how full it was when last looked at

    # -- networks --

    def new_network_id(self) -> str:
        """An id for `create_network`, where it is needed before."""
        return self._new_id()

    def check_free(self, subnet: str, driver: str) -> None:
        """Conflict if no new network of `driver` can have `subnet`."""
        check_subnets([subnet], self._taken(driver))

    def create_network(self, spec: NetworkSpec, id: str = "") -> Network:
        """Make a network; Conflict names what stands in the way, and nothing is changed."""
        self.check_stays()
        if self.catalogue.named(spec.name):
            raise Conflict(f"network {spec.name}", "exists", "Choose another name")
        if not self.catalogue.has_room(self.me):
            raise Exhausted(
                "networks",
                f"{NETWORKS_MAX} of this node are there, and the others take no more",
                "Remove some, or create it on another node",
            )
        taken = self._taken(spec.driver)
        self._check_mtu(spec)
        id = id or self._new_id()
        if spec.subnets:
            check_subnets(spec.subnets, taken)
        subnets = spec.subnets or choose_subnets(id, spec.ipv4, spec.ipv6, taken)
        gateways = tuple(first_gateway(subnet, spec.gateways) for subnet in subnets)
        now = self.clock()
        stamp = self.hybrid.next(now)
        network = Network(
            id,
            spec.name,
            spec.driver,
            subnets,
            gateways,
            next(iter(spec.ip_ranges), ""),
            self._choose_vni(spec.vni, id),
            spec.mtu,
            spec.internal,
            spec.encrypted,
            spec.options,
            spec.labels,
            now,
            self.me,
            stamp,
            born=stamp,
            ipam=spec.ipam,
            more_ranges=spec.ip_ranges[1:],
        )
        with Recording(self) as change:
            self._put(NETWORK + id, network)
            self._take_network(self.me, network, change)
            self._state_claims(id)
        return network

    def _taken(self, driver: str = "") -> list[tuple[str, str]]:
        """The subnets that no new network of a driver may overlap, and whose they are."""
        taken = [
            (f"network {self.catalogue.name(n.id)}", s)
            for n in self.catalogue.all()
            for s in n.subnets
        ]
        if driver not in LAN_DRIVERS:  # the subnet of one is what the hosts have there
            nodes = self.nodes.values()
            taken += [(f"a route of host {n.name}", r) for n in nodes for r in n.routes]
        return taken

    def choose_subnet(self, family: int, without: Iterable[str] = ()) -> str:
        """A subnet that a network made now could have and that overlaps none of `without` either.

        Exhausted or Conflict if there is none.
        """
        taken = [*self._taken(), *((subnet, subnet) for subnet in without)]
        return choose_subnets(self._new_id(), family == 4, family == 6, taken)[0]

    def remove_network(self, id: str) -> None:
        """Remove a network; InUse names its endpoints, NotFound if there is none."""
        network = self.find_network(id)
        held = self.members.get(network.id)
        if held and held.all:
            some = sorted(held.all.values(), key=lambda m: m.endpoint.name)[:3]
            names = ", ".join(f"{m.endpoint.name} on {self.node_name(m.node)}" for m in some) + (
                f" and {len(held.all) - 3} more" if len(held.all) > 3 else ""
            )
            raise InUse(
                f"network {self.catalogue.name(network.id)}",
                f"has endpoints: {names}",
                "Remove them first with 'vxmesh endpoint rm' on their node",
            )
        services = sorted(service.name for service in self.services.of(network.id))
        if services:
            raise InUse(
                f"network {self.catalogue.name(network.id)}",
                f"has services: {', '.join(services[:3])}"
                + (f" and {len(services) - 3} more" if len(services) > 3 else ""),
                "Remove them first with 'vxmesh service rm'",
            )
        with Recording(self) as change:
            # Who lost something to it must not fall back to that now; its creator may be away.
            for loser in list(self.catalogue.unsettled()):
                if any(loss.winner == network.id for loss in loser.lost):
                    self._write_network(loser, change)
            # One that was inherited stays deleted, for nodes that only know its creator's record.
            alone = self.catalogue.writers(network.id) == {self.me}
            if alone and network.creator == self.me:
                self._delete(NETWORK + network.id)
                self._note_networks(self.catalogue.drop(self.me, network.id), change)
            else:
                self._write_network(msgspec.structs.replace(network, deleted=True), change)
            self._state_claims(network.id)
            self.settle_conflicts()

    def amend_network(self, id: str, name: str, labels: dict[str, str]) -> Network:
        """Give a network another name and labels; Conflict if the name is another's."""
        network = self.find_network(id)
        other = self.catalogue.named(name)
        if other and other.id != network.id:
            raise Conflict(f"network {name}", "exists", "Choose another name")
        if (network.name, network.labels) != (name, labels):
            with Recording(self) as change:
                fresh = msgspec.structs.replace(network, name=name, labels=labels)
                self._write_network(fresh, change)
                self.settle_conflicts()
        return self.find_network(network.id)

    def _write_network(self, network: Network, change: Change) -> None:
        """Write a network's record under our own origin, above the one that counts now."""
        counts = self.catalogue.written(network.id)
        stamp = self.hybrid.next(self.clock(), counts.stamp if counts else 0)
        fresh = msgspec.structs.replace(network, stamp=stamp)
        self._put(NETWORK + network.id, fresh)
        self._take_network(self.me, fresh, change)

    def _take_network(self, origin: str, network: Network, change: Change) -> None:
        stamp = max(network.stamp, network.born)
        if not self.hybrid.receive(stamp, self.clock(), own=origin == self.me):
            self._ahead.setdefault(origin, False)
        super()._take_network(origin, network, change)

    # -- when two nodes wrote at once --

    def settle_conflicts(self, quietly: bool = False) -> None:
        """Make last what this node is to make last, and tell of conflicts that are new.

        To be called inside a Recording, after networks changed. `quietly` at start, when all
        that is known comes from disk and has been told of before.
        """
        with Recording(self) as change:
            for network in list(self.catalogue.unsettled()):
                if network.creator == self.me or network.creator in self.inherited:
                    self._write_network(network, change)
            standing = self.catalogue.conflicts()
            fresh = [] if quietly else sorted(standing - self._told)
            if len(fresh) > TOLD_AT_ONCE:
                message = f"{len(fresh)} conflicts of networks; {TOLD_AT_ONCE} of them are told"
                self.tell("network.conflict", message, count=str(len(fresh)))
            for conflict in fresh[:TOLD_AT_ONCE]:
                fields = {
                    "network": conflict.loser,
                    "with": conflict.winner,
                    "what": conflict.what,
                    "value": conflict.value,
                }
                self.tell("network.conflict", self.describe_conflict(conflict), **fields)
            self._told = standing
            for node in [node for node, told in self._ahead.items() if not told]:
                self._ahead[node] = True
                why = "its clock is more than a day ahead of this node's; set it"
                self.tell("clock.ahead", f"{self.node_name(node)}: {why}", node=node)

    def describe_conflict(self, conflict: Clash) -> str:
        """A sentence for people."""
        loser, winner = (self.catalogue.get(id) for id in (conflict.loser, conflict.winner))
        if not loser or not winner:
            return ""
        if conflict.what == "name":
            return (
                f"{loser.name} was called {conflict.value}, which the older {winner.id} is called"
            )
        if conflict.what == "vni":
            return (
                f"{loser.name} had VNI {conflict.value}, which the older {winner.name} has; "
                f"it has {loser.vni} now"
            )
        theirs = next(s for s in winner.subnets if block(s).meets(block(conflict.value)))
        return (
            f"{conflict.value} of {loser.name} overlaps {theirs} of the older {winner.name}: on "
            f"hosts that have both, {loser.name} has no gateway, names, way out or published ports"
        )

    def _check_mtu(self, spec: NetworkSpec) -> None:
        """Invalid if packets of an encrypted network would not fit.

        Inside WireGuard they are not taken apart on the way, and what does not fit is lost.
        """
        if not spec.encrypted:
            return
        largest = overlay.largest_mtu(True, self.nodes.values())
        if spec.mtu > largest:
            raise Invalid(
                f"MTU {spec.mtu}",
                f"is more than fits through WireGuard between these hosts, {largest}",
                "Leave --mtu out, or give less",
            )
        ipv6 = spec.ipv6 or any(":" in subnet for subnet in spec.subnets)
        if ipv6 and largest < MTU_MIN_V6:
            raise Invalid(
                f"network {spec.name}",
                f"cannot have IPv6: {largest} bytes fit through WireGuard between these hosts, "
                f"and IPv6 needs {MTU_MIN_V6}",
                "Raise the underlay's MTU, or leave IPv6 out",
            )

    def _choose_vni(self, wanted: int, id: str) -> int:
        used = {n.vni: n for n in self.catalogue.all()}
        if wanted:
            if wanted in used:
                other = self.catalogue.name(used[wanted].id)
                raise Conflict(f"VNI {wanted}", f"is network {other}'s", "Choose another")
            return wanted
        if len(used) >= VNIS_CHOSEN:
            raise Exhausted("VNIs", "are all taken", "Remove networks that nobody uses")
        return free_vni(id, used)

    # -- addresses --

    def donate(self, network_id: str, to: str, family: int, ranges: list[Range]) -> str:
        """Another node asks for addresses; why none went, or nothing if some did."""
        addresses = self.addresses.get(network_id)
        if addresses is None:
            return "the network is not known here"
        if self.expelled:
            return "this node was removed from the cluster"
        if to not in self.nodes or to == self.me:
            return "who asks is not known here yet; try again shortly"
        before = addresses.claims()
        if len(before.segments) + 2 * len(ranges) + 2 > SEGMENTS_MAX:
            # Else who asks for every other address could make our record too large to be taken.
            return f"its addresses are in {len(before.segments)} pieces, and more cannot be told"
        kept = addresses.donate(to, family, ranges)
        if addresses.claims() != before:
            with Recording(self):
                self._state_claims(network_id)
        elif kept:
            holder = self._members(network_id).with_address(kept[0])
            name = holder.endpoint.name if holder else "someone who has not been heard of"
            return f"{format_address(kept[0])} is taken by {name}"
        elif ranges:
            return "this node does not own them any more"
        else:
            total, used = addresses.space.usage(family)
            return f"nothing is free here ({used} of the network's {total} are used)"
        return ""

    def describe_usage(self, network: str, family: int, silent: Iterable[str] = ()) -> str:
        """How many addresses are used and who owns what is left, for people.

        `silent` are the nodes (ids) that do not answer.
        """
        usage = self.addresses[network].usage(family)
        used = {owner: count for owner, (_, count) in usage.owned.items() if count}
        free = {owner: size - count for owner, (size, count) in usage.owned.items()}
        text = f"{usage.used} of {usage.total} are used"
        if used:
            text += f" ({self._list(used)})"
        left = {owner: count for owner, count in free.items() if count}
        text += f", {usage.free} are free" + (f" ({self._list(left)})" if left else "")
        away = ", ".join(sorted(self.node_name(id) for id in silent))
        return f"{text}; {away} {'do' if ',' in away else 'does'} not answer" if away else text

    def _list(self, counts: dict[str, int]) -> str:
        named = sorted((self.node_name(id), count) for id, count in counts.items())
        return ", ".join(f"{name} {count}" for name, count in named)

    def _close(self, change: Change) -> None:
        """Tell when a network is nearly full; see core/fill.py."""
        super()._close(change)
        moved: dict[str, int] = {}
        for each in change.endpoints:
            count = len(each.new.endpoint.addresses) if each.new else 0
            if each.old:
                count += len(each.old.endpoint.addresses)
            moved[each.network] = moved.get(each.network, 0) + count
        for network in moved.keys() | change.networks.keys():
            addresses = self.addresses.get(network)
            if addresses is None:
                self._fill.pop(network, None)
                continue
            fill = self._fill.setdefault(network, Fill())
            if not fill.is_due(moved.get(network, 0)):
                continue
            for family in addresses.families():
                total, used = addresses.space.usage(family)
                if fill.look(family, total, used):
                    change.notices.append(self._note_low(network, family, total, used))

    def _note_low(self, network: str, family: int, total: int, used: int) -> Notice:
        name = self.catalogue.name(network)
        message = (
            f"network {name} is {used / total:.0%} full: "
            f"{used} of {total} IPv{family} addresses are used"
        )
        fields = {"network": name, "family": str(family), "total": str(total), "used": str(used)}
        log.warning("space.low", message=message, **fields)
        return Notice("space.low", message, fields)

    def _state_claims(self, network: str) -> None:
        addresses = self.addresses.get(network)
        if addresses:
            # What others gave to a lost node comes to light late.
            for lost in self.inherited & addresses.owners():
                addresses.reclaim(lost)
        claims = addresses.claims() if addresses else None
        key = CLAIMS + network
        stated = self.replica.get(self.me, key)
        if claims is None or not claims.segments:
            # Of a network that is only not known yet, what was stated must not be forgotten.
            if stated and network in self._closed:
                self._delete(key)
        elif stated != encode(claims):
            self._put(key, claims)
            # A network that goes from here and comes back finds its ring in what was stated.
            self._claims.setdefault(network, {})[self.me] = claims
