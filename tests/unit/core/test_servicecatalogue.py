"""Services that several nodes wrote: one verdict, whatever the order."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from agent.core.servicecatalogue import ServiceCatalogue
from agent.servicemodel import REFUSE, Check, Port, Service

NET, OTHER = "n" * 16, "o" * 16


def service(id: str, name: str = "web", born: int = 1, **fields: object) -> Service:
    made = Service(
        id * 16, name, NET, "vip", (), (Port(80, 80),), {}, (), 0.0, Check(), (), False,
        REFUSE, 0.0, {}, 1.0, "a" * 16, born, born=born,
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


def published(*ports: Port) -> tuple[Port, ...]:
    return ports


WEB = Port(80, 80, published=8080)


def view(catalogue: ServiceCatalogue) -> object:
    found = {s.id: s for s in catalogue.all()}
    return found, catalogue.conflicts(), sorted(s.id for s in catalogue.unsettled())


RECORDS = [
    ("a", service("1", born=1, ports=(WEB,))),
    ("b", service("2", born=2, ports=(WEB,))),
    ("c", service("3", born=3, ports=(WEB,), vips=(b"\x0a\0\0\5",))),
    ("a", service("4", "other", born=0, created=0.5, vips=(b"\x0a\0\0\5",))),
    ("b", service("3", born=3, stamp=9, deleted=True)),
]


def test_the_order_in_which_records_come_never_matters() -> None:
    seen = []
    for order in itertools.permutations(RECORDS):
        catalogue = ServiceCatalogue()
        for origin, record in order:
            catalogue.put(origin, record)
        seen.append(view(catalogue))
        held = ServiceCatalogue()
        held.hold()
        for origin, record in order:
            held.put(origin, record)
        held.release()
        seen.append(view(held))
    assert all(each == seen[0] for each in seen)


def test_the_older_keeps_the_name_and_the_other_goes_on_under_another() -> None:
    catalogue = ServiceCatalogue()
    old, young = service("2", born=1), service("1", born=2)
    catalogue.put("a", young)
    before = catalogue.put("b", old)
    assert before == {old.id: None, young.id: young}
    assert catalogue.named(NET, "web") == old
    shown = catalogue.named(NET, f"web-{young.id[:6]}")
    assert shown and shown.id == young.id
    [conflict] = catalogue.conflicts()
    assert conflict == (young.id, old.id, "name", "web")
    [written] = catalogue.unsettled()
    assert (written.name, written.ports) == (shown.name, young.ports)


def test_in_two_networks_one_name_is_two() -> None:
    catalogue = ServiceCatalogue()
    catalogue.put("a", service("1"))
    catalogue.put("a", service("2", network=OTHER))
    assert catalogue.conflicts() == set()


def test_a_published_port_is_the_olders_until_it_goes_and_nothing_is_forgotten() -> None:
    catalogue = ServiceCatalogue()
    old, young = service("1", "a", 1, ports=(WEB,)), service("2", "b", 2, ports=(WEB,))
    catalogue.put("a", old)
    catalogue.put("b", young)
    shown = catalogue.get(young.id)
    assert shown and shown.published == () and shown.ports == (Port(80, 80),)
    assert catalogue.conflicts() == {(young.id, old.id, "port", "8080/tcp")}
    assert list(catalogue.unsettled()) == [], "it is not written down: it may get it back"
    catalogue.drop("a", old.id)
    assert catalogue.get(young.id) == young


NODE1, NODE2 = ("1" * 16,), ("2" * 16,)
AT = "10.0.0.5"


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ({}, {}, True),
        ({"publish_on": NODE1}, {}, True),
        ({"publish_on": NODE1}, {"publish_on": NODE2}, False),
        ({"publish_on": NODE1 + NODE2}, {"publish_on": NODE2}, True),
        ({"ports": (Port(80, 80, "tcp", 8080, AT),)}, {}, True),
        (
            {"ports": (Port(80, 80, "tcp", 8080, AT),)},
            {"ports": (Port(80, 80, "tcp", 8080, "10.0.0.6"),)},
            False,
        ),
        ({"ports": (Port(80, 80, "udp", 8080),)}, {}, False),
        ({"ports": (Port(80, 80, "tcp", 8081),)}, {}, False),
    ],
)
def test_ports_meet_where_they_would_be_the_same_one(
    one: dict[str, object], other: dict[str, object], meet: bool
) -> None:
    catalogue = ServiceCatalogue()
    catalogue.put("a", service("1", "a", 1, **{"ports": (WEB,), **one}))
    catalogue.put("a", service("2", "b", 2, **{"ports": (WEB,), **other}))
    assert bool(catalogue.conflicts()) is meet


def test_an_address_that_is_given_twice_is_the_olders() -> None:
    catalogue = ServiceCatalogue()
    vip = b"\x0a\0\0\7"
    catalogue.put("a", service("1", "a", 1, vips=(vip,)))
    catalogue.put("b", service("2", "b", 2, vips=(vip,)))
    holder, loser = catalogue.with_address(NET, vip), catalogue.get("2" * 16)
    assert holder and holder.name == "a"
    assert loser and loser.vips == ()


def test_what_is_held_back_is_seen_by_nobody() -> None:
    catalogue = ServiceCatalogue()
    catalogue.hold()
    catalogue.put("a", service("1", ports=(WEB,)))
    assert catalogue.of(NET) == [] and catalogue.publishing("tcp", 8080) == []
    catalogue.release()
    assert len(catalogue.of(NET)) == len(catalogue.publishing("tcp", 8080)) == 1
