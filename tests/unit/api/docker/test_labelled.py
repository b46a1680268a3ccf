"""Services follow containers' labels: made, changed, taken back."""

from __future__ import annotations

import random

import pytest

from agent.api.docker import labelled
from agent.api.docker.labelled import MADE, Labelled, ports_of, wanted_by
from agent.core.replica import Delta
from agent.errors import Invalid
from agent.model import WORKLOAD, Network, Node
from agent.node import NodeState
from agent.requests import parse_endpoint, parse_network
from agent.servicemodel import Port
from agent.serviceops import ServiceOperations
from agent.servicespec import ServiceSpec


@pytest.mark.parametrize(
    ("ports", "publishes", "found"),
    [
        ("80", "", [Port(80, 80)]),
        ("80:8000, 53/udp", "", [Port(80, 8000), Port(53, 53, "udp")]),
        ("", "8080:80", [Port(80, 80, "tcp", 8080)]),
        ("", "8080", [Port(8080, 8080, "tcp", 8080)]),
        ("80:8000", "8080:80", [Port(80, 8000, "tcp", 8080)]),
        ("80:8000", "8080:8000", [Port(80, 8000, "tcp", 8080)]),
        ("80", "8080:80,9090:80", [Port(80, 80, "tcp", 8080), Port(80, 80, "tcp", 9090)]),
        ("80", "53:53/udp", [Port(80, 80), Port(53, 53, "udp", 53)]),
    ],
)
def test_ports_as_labels_say(ports: str, publishes: str, found: list[Port]) -> None:
    assert list(ports_of(ports, publishes)) == found


@pytest.mark.parametrize("text", ["x", "80:", "0", "70000", "80/icmp", "80:80:80", "-1"])
def test_what_is_malformed_is_told(text: str) -> None:
    with pytest.raises(Invalid):
        ports_of(text, "")


class Asker:
    def live_nodes(self) -> list[str]:
        return []


async def _done(wait: float = 0.0, networks: object = ()) -> None:
    pass


def exchange(one: NodeState, two: NodeState) -> None:
    """Each hears all that the other has written."""
    for source, target in ((one, two), (two, one)):
        source.replica.publish(source.replica.written())
        known = target.version(source.me)
        records = source.since(source.me, known)
        assert target.merge(Delta(source.me, known, source.version(source.me), records))


class Place:
    """A node with a network, whose containers ask for services."""

    def __init__(self, letter: str = "a", number: int = 1) -> None:
        address = f"10.99.0.{number}"
        me = Node(letter * 16, f"n{number}", address, 7946, address, 4789, "0", 0.0, 1500)
        self.node = NodeState(me, lambda: 1000.0 + number, random.Random(number))
        self.node.describe(me)
        if number == 1:
            self.web: Network = self.node.create_network(parse_network("web"))
        operations = ServiceOperations(self.node, None, Asker(), _done)  # type: ignore[arg-type]
        self.labelled = Labelled(self.node, operations)

    def container(self, name: str, **labels: str) -> str:
        own = {WORKLOAD: name, **{f"vxmesh.{key}": value for key, value in labels.items()}}
        return self.node.create_endpoint(self.web.id, parse_endpoint(name, labels=own)).id

    def services(self) -> dict[str, tuple[Port, ...]]:
        return {s.name: s.ports for s in self.node.services.all()}


@pytest.fixture
def place() -> Place:
    return Place()


async def test_from_the_first_container_to_the_last(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = place.container("one", service="api", port="80")
    two = place.container("two", service="api", port="80")
    place.container("three")
    assert await place.labelled._once() is None
    assert place.services() == {"api": (Port(80, 80),)}
    (service,) = place.node.services.all()
    chosen = place.node.backends_of(service, 1000.0)
    assert {row.endpoint.id for row in chosen} == {one, two}
    revision = place.node.revision
    await place.labelled._once()
    assert place.node.revision == revision  # told twice
    place.node.remove_endpoints([one])
    assert await place.labelled._once() is None and place.services()
    place.node.remove_endpoints([two])
    assert await place.labelled._once() == pytest.approx(labelled.GRACE)
    assert place.services()  # it may be back in a moment
    back = place.container("two", service="api", port="80:8000")
    assert await place.labelled._once() is None
    assert place.services() == {"api": (Port(80, 8000),)}
    place.node.remove_endpoints([back])
    monkeypatch.setattr(labelled, "GRACE", 0.0)
    await place.labelled._once()
    assert place.services() == {}


def two_places() -> tuple[Place, Place]:
    """With one network, of which each has addresses."""
    one, two = Place("a", 1), Place("b", 2)
    exchange(one.node, two.node)  # the network, of one
    assert one.node.donate(one.web.id, two.node.me, 4, []) == ""
    exchange(one.node, two.node)
    two.web = one.web
    return one, two


@pytest.mark.parametrize("maker", [0, 1])
async def test_of_labels_that_disagree_one_counts_for_all(maker: int) -> None:
    places = two_places()
    asked = {places[0].container("c1", service="api", port="80"): Port(80, 80)}
    asked[places[1].container("c2", service="api", port="8080")] = Port(8080, 8080)
    exchange(places[0].node, places[1].node)
    for place in (places[maker], places[1 - maker]) * 2:
        await place.labelled._once()
        exchange(places[0].node, places[1].node)
    revisions = [place.node.revision for place in places]
    for place in places * 2:
        assert await place.labelled._once() is None
        exchange(places[0].node, places[1].node)
        assert place.services() == {"api": (asked[min(asked)],)}
    assert [place.node.revision for place in places] == revisions  # settled
    # Who made it follows the other's containers too.
    gone = min(asked)
    for place in places:
        if place.node.local_endpoint(gone):
            place.node.remove_endpoints([gone])
    exchange(places[0].node, places[1].node)
    for place in places * 2:
        await place.labelled._once()
        exchange(places[0].node, places[1].node)
    assert {p.services()["api"] for p in places} == {(asked[max(asked)],)}


async def test_of_two_that_were_made_at_once_the_older_one_stays() -> None:
    one, two = two_places()
    for place in (one, two):
        place.container(f"c{place.node.me[0]}", service="api", port="80")
        await place.labelled._once()
        assert list(place.services()) == ["api"]
    exchange(one.node, two.node)
    assert len(one.services()) == 2  # the younger one under another name
    for place in (one, two, one, two):
        await place.labelled._once()
        exchange(one.node, two.node)
    assert one.services() == two.services() == {"api": (Port(80, 80),)}
    (service,) = one.node.services.all()
    assert service.creator == one.node.me
    assert len(one.node.backends_of(service, 1000.0)) == 2


async def test_services_of_others_are_left_alone(place: Place) -> None:
    place.container("one", service="api", port="80")
    await place.labelled._once()
    (service,) = place.node.services.all()
    spec = ServiceSpec("mine", place.web.id, ports=(Port(1, 1),))
    await place.labelled._operations.create(spec)
    place.container("two", service="mine", port="80")
    await place.labelled._once()
    assert place.services() == {"api": (Port(80, 80),), "mine": (Port(1, 1),)}
    assert service.labels == {MADE: "api"}


async def test_what_cannot_be_is_tried_again_and_stops_nothing_else(place: Place) -> None:
    place.container("taken")
    place.container("one", service="taken", port="80")
    place.container("two", service="api", port="nonsense")
    place.container("three", service="good", port="80")
    assert await place.labelled._once() == labelled.AGAIN
    assert list(place.services()) == ["good"]


def test_only_containers_ask(place: Place) -> None:
    id = place.node.create_endpoint(
        place.web.id, parse_endpoint("x", labels={"vxmesh.service": "api"})
    ).id
    endpoint = place.node.local_endpoint(id)
    assert endpoint and wanted_by(endpoint) is None
