"""Where services lead: which endpoints are backends, and which of them take connections."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest

from agent.core.members import EndpointChange, Member, Members
from agent.core.services import Row, Selection, is_ready, rows, taking
from agent.model import Endpoint
from agent.servicemodel import (
    ALL,
    NO_CHECK,
    REFUSE,
    RUNTIME,
    TCP,
    Check,
    Chosen,
    Health,
    Port,
    Service,
    Verdict,
    summed,
)

NET, OTHER = "n" * 16, "o" * 16


def endpoint(number: int, network: str = NET, sandbox: str = "s", **labels: str) -> Endpoint:
    id = f"{number:016x}"
    mac = b"\x02" + number.to_bytes(5)
    address = bytes((10, 0, 0, number))
    return Endpoint(id, network, f"e{number}", mac, (address,), (), labels, sandbox)


def service(name: str = "web", **fields: object) -> Service:
    made = Service(
        name * 2, name, NET, "vip", (), (Port(80, 8000),), {}, (), 0.0, Check(), (), False,
        REFUSE, 0.0, {}, 1.0, "a" * 16,
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


class World:
    """Endpoints and services put in and out, with what follows."""

    def __init__(self) -> None:
        self.members = {NET: Members("me"), OTHER: Members("me")}
        self.selection = Selection()
        self.services: dict[str, Service] = {}

    def put(self, new: Endpoint) -> set[str]:
        old = self.members[new.network].put(new, "me")
        return self.selection.moved([EndpointChange(new.network, old, Member(new, "me"))])

    def drop(self, held: Endpoint) -> set[str]:
        old = self.members[held.network].drop(held.id)
        return self.selection.moved([EndpointChange(held.network, old, None)])

    def serve(self, made: Service) -> None:
        self.services[made.id] = made
        self.selection.put(made, self.members[made.network])

    def chosen(self, made: Service) -> list[str]:
        found = self.selection.endpoints_of(made.id)
        for id in found:
            assert made.id in self.selection.services_of(id)
        return found

    def expected(self, made: Service) -> list[str]:
        """By the definition, all looked at."""
        named = {each.endpoint for each in made.backends if each.added}
        return sorted(
            id
            for id, member in self.members[made.network].all.items()
            if id in named or made.selects(member.endpoint.labels)
        )


@pytest.fixture
def world() -> World:
    return World()


def test_a_selector_wants_all_of_its_labels_and_stays_in_its_network(world: World) -> None:
    web = service(selector={"app": "web", "tier": "front"})
    world.serve(web)
    both, half = endpoint(1, app="web", tier="front"), endpoint(2, app="web")
    assert world.put(both) == {web.id}
    assert world.put(half) == set()
    assert world.put(endpoint(3, OTHER, app="web", tier="front")) == set()
    assert world.chosen(web) == [both.id]
    assert world.drop(both) == {web.id}
    assert world.chosen(web) == []


def test_a_service_without_a_selector_chooses_nobody(world: World) -> None:
    world.put(endpoint(1, app="web"))
    world.serve(service())
    assert world.chosen(service()) == []


def test_a_named_one_is_a_backend_as_soon_as_it_is_there(world: World) -> None:
    one = endpoint(1)
    web = service(backends=(Chosen(one.id, 5),))
    world.serve(web)
    assert world.chosen(web) == []
    assert world.put(one) == {web.id}
    assert world.chosen(web) == [one.id]
    world.serve(service())
    assert world.chosen(service()) == []


def test_a_weight_alone_makes_nobody_a_backend(world: World) -> None:
    one = endpoint(1, app="web")
    world.put(one)
    web = service(selector={"app": "web"}, backends=(Chosen(one.id, 5, added=False),))
    world.serve(web)
    assert world.chosen(web) == [one.id]
    world.put(msgspec.structs.replace(one, labels={}))
    assert world.chosen(web) == []


def test_an_endpoint_that_changes_tells_of_services_that_it_leaves_and_joins(world: World) -> None:
    web, db = service("web", selector={"app": "web"}), service("db", selector={"app": "db"})
    world.serve(web)
    world.serve(db)
    world.put(endpoint(1, app="web"))
    assert world.put(endpoint(1, app="db")) == {web.id, db.id}
    assert (world.chosen(web), world.chosen(db)) == ([], [endpoint(1).id])


def _labels(rng: random.Random) -> dict[str, str]:
    return {key: rng.choice("xy") for key in rng.sample(["a", "b", "c"], rng.randrange(3))}


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_it_is_what_a_look_at_all_would_find(seed: int) -> None:
    rng, world = random.Random(seed), World()
    for _ in range(300):
        number = rng.randrange(1, 12)
        name = rng.choice(["web", "db", "kv"])
        action = rng.randrange(4)
        if action == 0:
            held = world.members[NET].all.get(f"{number:016x}")
            if held:
                world.drop(held.endpoint)
        elif action == 1:
            ids = rng.sample(range(1, 12), rng.randrange(3))
            chosen = tuple(Chosen(f"{i:016x}", added=rng.random() < 0.7) for i in sorted(ids))
            world.serve(service(name, selector=_labels(rng), backends=chosen))
        elif action == 2 and rng.random() < 0.3:
            made = service(name)
            world.services.pop(made.id, None)
            world.selection.drop(made.id)
        else:
            world.put(endpoint(number, **_labels(rng)))
        for made in world.services.values():
            assert world.chosen(made) == world.expected(made)


# -- which take connections --


def row(number: int = 1, **fields: object) -> Row:
    made = Row(endpoint(number), "node", 1, "unknown", False)
    return made._replace(**fields)  # type: ignore[arg-type]


def cases() -> Iterator[tuple[str, Row, bool]]:
    """Kind of check, backend, whether it takes connections."""
    yield NO_CHECK, row(), True
    yield NO_CHECK, row(health="unhealthy"), False  # the runtime said so
    yield TCP, row(), False  # nobody has looked yet
    yield TCP, row(health="healthy"), True
    yield TCP, row(health="unhealthy"), False
    yield TCP, row(endpoint=endpoint(1, sandbox="")), True  # nobody can look from inside
    yield RUNTIME, row(endpoint=endpoint(1, sandbox="")), False  # but the runtime could tell
    yield RUNTIME, row(health="healthy"), True
    yield TCP, row(health="healthy", draining=True), False
    yield TCP, row(health="healthy", weight=0), False
    yield TCP, row(health="healthy", is_gone=True), False


@pytest.mark.parametrize(("kind", "backend", "expected"), list(cases()))
def test_who_takes_new_connections(kind: str, backend: Row, expected: bool) -> None:
    made = service(health=Check(kind))
    assert is_ready(made, backend) is expected
    assert bool(taking(made, [backend])) is expected


def test_if_none_is_healthy_it_refuses_or_takes_all_that_are_there() -> None:
    found = [
        row(1, health="unhealthy"),
        row(2, health="unhealthy", draining=True),
        row(3, health="unhealthy", is_gone=True),
    ]
    assert taking(service(health=Check(TCP)), found) == []
    assert taking(service(health=Check(TCP), all_unhealthy=ALL), found) == found[:1]
    healthy = row(4, health="healthy")
    assert taking(service(health=Check(TCP), all_unhealthy=ALL), [*found, healthy]) == [healthy]


def test_a_drain_is_over_when_its_time_is_up() -> None:
    one = endpoint(1)
    chosen = (Chosen(one.id, 2, draining=True, since=100.0),)

    def look(now: float, timeout: float) -> Row:
        made = service(backends=chosen, drain_timeout=timeout)
        [found] = rows(made, [Member(one, "n")], lambda member: None, set(), now)
        return found

    assert not look(109.9, 10.0).is_over and look(110.0, 10.0).is_over
    assert not look(1e9, 0.0).is_over, "0: never"


def test_rows_say_what_is_known_of_each() -> None:
    web = service()
    one, two = endpoint(1), endpoint(2)
    health = Health(
        one.id, "unhealthy", 5.0, "x", verdicts=(Verdict(web.id, "unhealthy", 5.0, "x"),)
    )
    known = {one.id: health}
    members = [Member(two, "gone"), Member(one, "here")]
    found = rows(web, members, lambda m: known.get(m.endpoint.id), {"gone"}, 0.0)
    assert [(r.node, r.health, r.why, r.is_gone) for r in found] == [
        ("here", "unhealthy", "x", False),
        ("gone", "unknown", "", True),
    ]


# -- health --


def test_what_one_services_check_finds_is_not_anothers() -> None:
    bad = Health(
        "e", "", 0.0, verdicts=(Verdict("a", "unhealthy", 1.0, "why"), Verdict("b", "healthy", 1.0))
    )
    assert (bad.of("a"), bad.of("b"), bad.of("c")) == ("unhealthy", "healthy", "unknown")
    assert (bad.why("a"), bad.why("b")) == ("why", "")


def test_what_the_runtime_finds_ill_is_ill_for_all_and_what_it_finds_well_where_nobody_looks() -> (
    None
):
    verdicts = (Verdict("a", "healthy", 1.0), Verdict("b", "unhealthy", 1.0))
    ill = Health("e", "", 0.0, told="unhealthy", told_reason="sick", verdicts=verdicts)
    assert {ill.of(service) for service in "abc"} == {"unhealthy"}
    assert ill.why("a") == "sick"
    well = Health("e", "", 0.0, told="healthy", verdicts=verdicts)
    assert [well.of(service) for service in "abc"] == ["healthy", "unhealthy", "healthy"]


def test_all_in_all_it_is_unhealthy_if_anything_says_so_and_keeps_since_when() -> None:
    health = Health("e", "", 0.0)
    assert summed(health, 1.0) is None
    health = msgspec.structs.replace(health, verdicts=(Verdict("a", "healthy", 2.0),))
    first = summed(health, 2.0)
    assert first and (first.state, first.since) == ("healthy", 2.0)
    again = summed(msgspec.structs.replace(first, told="healthy"), 3.0)
    assert again and (again.state, again.since) == ("healthy", 2.0)
    ill = summed(msgspec.structs.replace(again, told="unhealthy", told_reason="x"), 4.0)
    assert ill and (ill.state, ill.since, ill.reason) == ("unhealthy", 4.0, "x")
