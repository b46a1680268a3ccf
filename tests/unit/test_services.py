"""A node's services: made, changed, judged; what the kernel is to hold; who looks at them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from agent.drivers.balancing import Frontend, FrontendKey
from agent.drivers.frontends import frontends
from agent.drivers.overlay import router_mac
from agent.errors import Conflict, Exhausted, InUse, Invalid, NotFound, VxmeshError
from agent.health.checker import HealthChecker
from agent.health.probes import Prober, Target
from agent.model import Network, Publish, Sandbox
from agent.notation import parse_address
from agent.plan import Plan, Touched
from agent.requests import parse_endpoint
from agent.servicemodel import DNSRR, Check, Port, Service
from agent.serviceops import ServiceOperations
from agent.servicespec import ServiceSpec, parse_check, parse_port, parse_service
from agent.views import Change, Status
from tests.unit.test_conflicts import Half, meet


@pytest.fixture
def halves() -> tuple[Half, Half]:
    a, b = Half(1), Half(2)
    a.make()
    meet(a, b)
    return a, b


def home(half: Half) -> Network:
    return half.find_network("web")


def spec(name: str = "shop", **fields: object) -> ServiceSpec:
    wanted = {"ports": [parse_port(80, 8000)], "selector": {"app": "shop"}, **fields}
    return parse_service(name, "web", **wanted)  # type: ignore[arg-type]


def endpoint(half: Half, name: str, sandbox: str = "", **labels: str) -> str:
    return half.create_endpoint(home(half).id, parse_endpoint(name, labels=labels), sandbox).id


def frontend(plan: Plan, service: Service, port: int = 80) -> Frontend:
    found = plan.frontend(FrontendKey(service.id, "tcp", port))
    assert found and plan.frontends()[found.id] == found
    return found


# -- making and changing --


def test_a_service_gets_an_address_that_nobody_else_gets(halves: tuple[Half, Half]) -> None:
    a, _ = halves
    made = a.create_service(spec())
    [vip] = made.vips
    taken = {vip}
    while True:
        try:
            held = a.create_endpoint(home(a).id, parse_endpoint(f"e{len(taken)}"))
        except Exhausted:
            break
        assert not taken & set(held.addresses)
        taken.update(held.addresses)
    assert len(taken) == 253, "the whole subnet but the gateway"
    a.remove_service(made.id)
    assert a.create_endpoint(home(a).id, parse_endpoint("last")).addresses == (vip,)


def test_an_address_of_its_own_choice_is_refused_where_somebody_has_it(
    halves: tuple[Half, Half],
) -> None:
    a, _ = halves
    held = a.create_endpoint(home(a).id, parse_endpoint("one")).addresses[0]
    text = ".".join(map(str, held))
    with pytest.raises(Conflict, match="one"):
        a.create_service(spec(vips=[text]))
    made = a.create_service(spec(vips=["10.1.0.200"]))
    assert made.vips == (parse_address("10.1.0.200"),)
    with pytest.raises(Conflict, match="service shop"):
        a.create_endpoint(home(a).id, parse_endpoint("two", addresses=["10.1.0.200"]))
    with pytest.raises(Conflict, match="service shop"):
        a.reserve(
            home(a).id,
            [parse_endpoint("x", mac="02:00:00:00:00:09", addresses=["10.1.0.200"])],
        )


def test_a_name_is_an_endpoints_or_a_services(halves: tuple[Half, Half]) -> None:
    a, b = halves
    endpoint(a, "one")
    meet(a, b)
    with pytest.raises(Conflict, match="n1"):
        b.create_service(spec("one", mode=DNSRR))
    b.set_status(a.me, Status("unreachable", "", 0.0, withdrawn=True))
    assert b.create_service(spec("one", mode=DNSRR)), "what ran on a host that is gone"
    for wanted in (parse_endpoint("one"), parse_endpoint("x", aliases=["one"])):
        with pytest.raises(Conflict, match="service one"):
            b.create_endpoint(home(b).id, wanted)
    b.create_service(spec("two", mode=DNSRR))
    meet(a, b)
    plain = parse_endpoint("two", mac="02:00:00:00:00:01", addresses=["10.1.0.99"])
    with pytest.raises(Conflict, match="service two"):
        a.reserve(home(a).id, [plain])


def test_a_network_with_services_stays(halves: tuple[Half, Half]) -> None:
    a, _ = halves
    made = a.create_service(spec())
    with pytest.raises(InUse, match="shop"):
        a.remove_network("web")
    a.remove_service(made.id)
    a.remove_network("web")


def test_an_update_changes_what_was_meant_and_nothing_else(halves: tuple[Half, Half]) -> None:
    a, b = halves
    made = a.create_service(spec(labels={"x": "y"}))
    endpoint(a, "one", app="shop")
    meet(a, b)
    b.drain_backend("shop", "", "one")
    changed = b.update_service("shop", "", spec(affinity="client"), ["affinity"])
    meet(a, b)
    assert a.services.get(made.id) == changed
    assert changed == msgspec.structs.replace(
        made, affinity=10_800.0, backends=changed.backends, stamp=changed.stamp
    )
    assert changed.backends[0].draining
    for field in ("mode", "name", "nothing"):
        with pytest.raises(Invalid):
            b.update_service("shop", "", spec(), [field])
    with pytest.raises(Invalid, match="no TCP port"):
        udp = spec(ports=[parse_port(53, protocol="udp")], health=parse_check("tcp"))
        b.update_service("shop", "", udp, ["ports", "health"])


def test_a_port_of_a_service_is_no_sandboxs_and_the_other_way_round(
    halves: tuple[Half, Half],
) -> None:
    a, b = halves
    web = [parse_port(80, published=8080)]
    box = Sandbox("s" * 16, "box", "/x", 1, 0, 0, 0.0, publishes=(Publish(8080, 80),))
    a.put_sandbox(box)
    with pytest.raises(Conflict, match="sandbox box on n1"):
        a.create_service(spec(ports=web))
    made = b.create_service(spec(ports=web, publish_on=["n2"], mode=DNSRR))
    with pytest.raises(Conflict, match="service shop"):
        b.check_publishes([Publish(8080, 1)])
    b.check_publishes([Publish(8080, 1, "udp"), Publish(8081, 1)])
    meet(a, b)
    a.check_publishes([Publish(8080, 1)])
    with pytest.raises(Conflict, match="service shop in network web"):
        a.create_service(spec("more", ports=web, publish_on=["n2"]))
    assert b.services.get(made.id)


def test_a_port_that_a_service_lost_does_not_keep_it_from_being_changed(
    halves: tuple[Half, Half],
) -> None:
    a, b = halves
    web = [parse_port(80, published=8080)]
    for half, name in ((a, "one"), (b, "two")):
        half.create_service(spec(name, ports=web, mode=DNSRR))
    meet(a, b)
    [lost] = [service for service in b.services.all() if not service.published]
    b.update_service(lost.id, "", spec(selector={"app": "other"}), ["selector"])
    changed = b.services.get(lost.id)
    assert changed and changed.selector == {"app": "other"} and not changed.published
    at = [parse_port(80, published=8080, published_at="10.0.0.1")]
    with pytest.raises(Conflict, match="is published by service"):
        b.update_service(lost.id, "", spec(ports=at), ["ports"])


async def test_a_service_that_is_named_twice_is_removed_once(halves: tuple[Half, Half]) -> None:
    a, _ = halves
    made = a.create_service(spec())

    async def done(wait: float = 0.0, networks: Sequence[str] = ()) -> None:
        pass

    nobody: Any = None
    operations = ServiceOperations(a, nobody, nobody, done)
    assert await operations.remove(["shop", made.id]) == [made.id]
    assert not a.services.get(made.id)


def test_only_a_port_at_an_address_costs_a_look_at_every_node(halves: tuple[Half, Half]) -> None:
    a, _ = halves
    nodes = iter(list(a.nodes.values()))
    plain = a.create_service(spec(ports=[parse_port(80, published=8080)]))
    assert frontends(plain, home(a), [], nodes, a.me)
    assert len(list(nodes)) == len(a.nodes)


def test_who_is_no_backend_is_not_drained_and_who_is_chosen_is_not_taken_out(
    halves: tuple[Half, Half],
) -> None:
    a, _ = halves
    a.create_service(spec())
    endpoint(a, "chosen", app="shop")
    endpoint(a, "other")
    with pytest.raises(NotFound, match="no backend"):
        a.drain_backend("shop", "", "other")
    with pytest.raises(InUse, match="by its labels"):
        a.remove_backend("shop", "", "chosen")
    a.add_backend("shop", "", "other", 7)
    assert {r.endpoint.name: r.weight for r in a.backends_of(a.find_service("shop"), 0.0)} == {
        "chosen": 1,
        "other": 7,
    }


def test_what_a_removed_node_made_goes_on_as_its_heirs(halves: tuple[Half, Half]) -> None:
    a, b = halves
    made = a.create_service(spec())
    meet(a, b)
    b.inherit([a.me])
    assert b.services.get(made.id) == made
    assert b.services.writers(made.id) == {b.me}
    with pytest.raises(Conflict):
        b.create_endpoint(
            home(b).id, parse_endpoint("x", addresses=[".".join(map(str, made.vips[0]))])
        )
    b.remove_service(made.id)
    assert list(b.services.all()) == []


def test_a_record_that_is_not_sound_is_left_out(halves: tuple[Half, Half]) -> None:
    a, b = halves
    made = a.create_service(spec())
    for bad in (
        {"mode": "odd"},
        {"ports": (Port(0, 1),)},
        {"ports": (Port(80, 80, "sctp"),)},
        {"health": Check("tcp", interval=0.0)},
        {"health": Check("http", "/a b")},
        {"name": "Not A Label"},
        {"vips": (b"123",)},
        {"affinity": float("nan")},
        {"publish_on": ("../x y",)},
    ):
        wrong = msgspec.structs.replace(made, stamp=made.stamp + 1, **bad)
        with contextlib.suppress(VxmeshError):
            a._write_service(wrong)
        meet(a, b)
        assert b.services.get(made.id) in (None, made), bad


# -- health --


def test_health_is_its_own_nodes_to_tell_and_goes_with_the_endpoint(
    halves: tuple[Half, Half],
) -> None:
    a, b = halves
    id = endpoint(a, "one", app="shop")
    meet(a, b)
    with pytest.raises(InUse, match="lives on n1"):
        b.tell_health(id, "healthy")
    a.tell_health(id, "unhealthy", "ill")
    written = a.replica.written()
    a.tell_health(id, "unhealthy", "ill")
    assert a.replica.written() == written, "nothing new, nothing written"
    meet(a, b)
    _, member = b.find_endpoint("one")
    health = b.health_of(member)
    assert health and (health.state, health.reason) == ("unhealthy", "ill")
    a.remove_endpoints([id])
    meet(a, b)
    assert [key for key, _, value in a.replica.items(a.me) if key.startswith("h/") and value] == []
    assert b._health == {}


def test_it_is_told_when_a_service_has_nobody_left_and_when_it_has_again(
    halves: tuple[Half, Half],
) -> None:
    a, b = halves
    a.create_service(spec(health=parse_check("runtime")))
    id = endpoint(a, "one", app="shop")
    meet(a, b)
    for state in ("healthy", "unhealthy", "healthy"):
        a.tell_health(id, state)
        meet(a, b)
    for half in halves:
        kinds = [n.kind for n in half.notices if n.kind.startswith("service.")]
        assert kinds == ["service.down", "service.up"]
    b.set_status(a.me, Status("unreachable", "", 0.0, withdrawn=True))
    assert [n.message for n in b.notices][-1].endswith("of 1, 1 on lost nodes")


# -- what the kernel is to hold --


@pytest.fixture
def planned(halves: tuple[Half, Half]) -> tuple[Half, Half, Plan, Callable[[], Touched]]:
    a, b = halves
    plan = Plan(a)
    seen: list[Touched] = []
    a.listeners.append(lambda change: seen.append(plan.touched(change)))

    def touched() -> Touched:
        return seen[-1]

    return a, b, plan, touched


Planned = tuple[Half, Half, Plan, Callable[[], Touched]]


def test_a_frontend_is_where_the_network_is_and_follows_what_it_leads_to(planned: Planned) -> None:
    a, _, plan, touched = planned
    service = a.create_service(spec(health=parse_check("runtime")))
    assert plan.frontends() == {}, "the network is not on this host"
    id = endpoint(a, "one", app="shop")
    found = frontend(plan, service)
    assert touched().services == {found.id}
    assert (found.address, found.port) == (service.vips[0], 80)
    [backend] = found.backends
    assert (backend.key, backend.port, backend.draining) == (id, 8000, True)
    a.tell_health(id, "healthy")
    assert not frontend(plan, service).backends[0].draining
    assert touched().services == {found.id}
    a.drain_backend("shop", "", "one")
    assert frontend(plan, service).backends[0].draining
    endpoint(a, "stranger", app="other")
    assert touched().services == set(), "one changed element costs that element"
    a.remove_endpoints([id])
    assert frontend(plan, service).backends == ()
    a.remove_service(service.id)
    assert plan.frontends() == {} and touched().services == {found.id}


def test_backends_of_a_node_that_is_gone_are_left_out_and_come_back(planned: Planned) -> None:
    a, b, plan, touched = planned
    endpoint(a, "here")
    service = a.create_service(spec())
    meet(a, b)
    a.donate(home(a).id, b.me, 4, [])
    meet(a, b)
    endpoint(b, "there", app="shop")
    meet(a, b)
    assert len(frontend(plan, service).backends) == 1
    a.set_status(b.me, Status("unreachable", "", 0.0, withdrawn=True))
    assert frontend(plan, service).backends == ()
    assert touched().services == {frontend(plan, service).id}
    a.set_status(b.me, Status("alive", "", 0.0))
    assert len(frontend(plan, service).backends) == 1


def test_a_published_service_brings_its_network_to_hosts_without_an_endpoint(
    planned: Planned,
) -> None:
    a, _, plan, touched = planned
    assert plan.bridges() == {}
    port = parse_port(80, 8000, published=8080)
    service = a.create_service(spec(ports=[port]))
    assert list(plan.bridges()) == [500] and touched().bridges == {500}
    assert plan.all_rows(500).neighbours == [(service.vips[0], router_mac(home(a).id, a.me))]
    assert frontend(plan, service).published == ((b"", 8080),)
    a.update_service("shop", "", spec(ports=[parse_port(80, 8000)]), ["ports"])
    assert plan.bridges() == {} and plan.frontends() == {}


def test_at_an_address_it_is_published_where_that_may_be(planned: Planned) -> None:
    a, b, plan, _ = planned
    port = parse_port(80, 8000, published=8080, published_at="10.99.0.2")
    service = a.create_service(spec(ports=[port]))
    endpoint(a, "one")
    assert frontend(plan, service).published == (), "that is the other node's"
    theirs = Plan(b)
    meet(a, b)
    endpoint_change = Change(networks={home(b).id: None})
    theirs.touched(endpoint_change)
    assert frontend(theirs, service).published == ((parse_address("10.99.0.2"), 8080),)


def test_an_agent_that_starts_plans_what_it_has_from_disk(planned: Planned) -> None:
    a, _, plan, _ = planned
    service = a.create_service(spec())
    endpoint(a, "one", app="shop")
    assert Plan(a).frontends() == plan.frontends() != {}
    assert service.id in {key.service for key in plan.frontends()}


def test_a_drain_that_is_over_is_seen_when_it_is_looked_at_again(planned: Planned) -> None:
    a, _, plan, touched = planned
    service = a.create_service(spec(drain_timeout=5.0))
    endpoint(a, "one", app="shop")
    a.drain_backend("shop", "", "one")
    assert frontend(plan, service).backends[0].draining
    a.now += 5.0
    a.look_again(service.id)
    assert frontend(plan, service).backends == () and touched().services


# -- who looks --


class Looker(Prober):
    """Says what it is told to say."""

    def __init__(self) -> None:
        super().__init__(1)
        self.says: dict[bytes, str] = {}  # address -> why not healthy
        self.looks = 0
        self.under_way = self.most = 0

    async def look(self, target: Target) -> str:
        self.looks += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.01)
        self.under_way -= 1
        return self.says.get(target.address, "")


@contextlib.asynccontextmanager
async def checking(half: Half, prober: Looker):  # type: ignore[no-untyped-def]
    checker = HealthChecker(half, prober)
    checker.start()
    try:
        yield checker
    finally:
        await checker.stop()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


def box(half: Half, *names: str) -> list[str]:
    """A sandbox with endpoints of these names."""
    id = "b" * 16
    ids = [endpoint(half, name, sandbox=id, app="shop") for name in names]
    ifnames = tuple(f"eth{n}" for n in range(len(ids)))
    half.put_sandbox(Sandbox(id, "box", "/x", 1, 0, 0, 0.0, tuple(ids), ifnames))
    return ids


def state(half: Half, id: str) -> str:
    health = half.health_of(half.find_endpoint(id)[1])
    return health.state if health else ""


CHECK = parse_check("tcp", interval=0.1)


async def test_looks_are_told_only_when_something_changes(halves: tuple[Half, Half]) -> None:
    a, _ = halves
    prober = Looker()
    async with checking(a, prober) as checker:
        a.create_service(spec(health=CHECK))
        [id] = box(a, "one")
        await until(lambda: state(a, id) == "healthy")
        written, looks = a.replica.written(), prober.looks
        await until(lambda: prober.looks > looks + 3)
        assert a.replica.written() == written
        prober.says[a.local_endpoint(id).addresses[0]] = "no"  # type: ignore[union-attr]
        await until(lambda: state(a, id) == "unhealthy")
        a.update_service("shop", "", spec(), ["health"])
        await until(lambda: state(a, id) == "")
        assert checker.count == 0
        a.update_service("shop", "", spec(health=CHECK), ["health"])
        assert checker.count == 1
        a.drop_sandbox("b" * 16)
        assert checker.count == 0


async def test_no_more_than_some_hundred_looks_are_under_way(halves: tuple[Half, Half]) -> None:
    a, _ = halves
    prober = Looker()
    async with checking(a, prober) as checker:
        a.create_service(spec(health=CHECK))
        box(a, *(f"w{n}" for n in range(200)))
        assert checker.count == 200
        await until(lambda: prober.looks > 400)
        assert 100 < prober.most <= 128


async def test_last_states_hold_over_a_restart_until_a_look_says_otherwise(
    halves: tuple[Half, Half],
) -> None:
    a, _ = halves
    slow = parse_check("tcp", interval=60.0)
    async with checking(a, Looker()):
        a.create_service(spec(health=slow))
        [id] = box(a, "one")
        await until(lambda: state(a, id) == "healthy")
    written = a.replica.written()
    async with checking(a, Looker()):
        await asyncio.sleep(0.05)
        assert state(a, id) == "healthy" and a.replica.written() == written
    a.update_service("shop", "", spec(), ["health"])  # nobody looks: what was said is stale
    async with checking(a, Looker()):
        assert state(a, id) == ""
