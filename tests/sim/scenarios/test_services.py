"""Services in a cluster that falls apart and meets again: one view, no address twice."""

from __future__ import annotations

import contextlib
import random

import pytest

from agent.errors import VxmeshError
from agent.requests import parse_endpoint, parse_network
from agent.servicemodel import Service
from agent.servicespec import parse_check, parse_port, parse_service
from tests.sim.cluster import Cluster, SimNode
from tests.sim.network import Weather

FAIR = Weather(loss=0.0, duplication=0.0, delay=(0.0005, 0.002), partitions=0)
BAD = Weather(loss=0.2, duplication=0.1, delay=(0.001, 0.5), partitions=3)
STORM, CALM = 20.0, 20.0  # virtual s


def settle(cluster: Cluster, seconds: float = CALM) -> None:
    cluster.heal()
    cluster.wire.weather = FAIR
    cluster.clock.run_until(cluster.clock.now + seconds)
    cluster.check_always()
    cluster.check_equal()


def make(node: SimNode, name: str, network: str = "net", published: int = 0) -> Service:
    port = parse_port(80, 8000, published=published)
    spec = parse_service(
        name, network, ports=[port], selector={"app": "web"}, health=parse_check("runtime")
    )
    return node.allocate(lambda: node.state.create_service(spec))


def run_one(node: SimNode, name: str, network: str = "net") -> str:
    spec = parse_endpoint(name, labels={"app": "web"})
    home = node.state.find_network(network).id
    return node.allocate(lambda: node.state.create_endpoint(home, spec)).id


def test_two_halves_that_make_the_same_service_agree_which_one_it_is() -> None:
    cluster = Cluster(1, 4, FAIR)
    a, b, c, d = cluster.nodes.values()
    a.state.create_network(parse_network("net", subnets=["10.1.0.0/24"]))
    settle(cluster, 2.0)
    for node in (a, b, c, d):
        run_one(node, f"w{node.id[-1]}")  # so that each owns some addresses
    settle(cluster, 2.0)
    cluster.partition({c.id, d.id}, one_way=False)
    old = make(a, "web", published=8080)
    cluster.clock.run_until(cluster.clock.now + 1.0)
    young = make(d, "web", published=8080)
    run_one(c, "late")
    a.state.tell_health(next(iter(a.state.members[old.network].local)), "healthy")
    settle(cluster)
    for node in cluster.nodes.values():
        state = node.state
        shown = state.services.get(young.id)
        assert state.services.named(old.network, "web") == old
        assert shown and shown.name == f"web-{young.id[:6]}" and shown.published == ()
        assert shown.vips == young.vips != old.vips, "both go on with their own address"
        for service in (old, shown):
            backends = state.backends_of(service, 0.0)
            assert len(backends) == 5
            assert [r.health for r in backends].count("healthy") == 1
        told = {clash.what for clash in state.services.conflicts_of(young.id)}
        assert told == {"name", "port"}
    a.state.remove_service(old.id)
    settle(cluster)
    for node in cluster.nodes.values():
        shown = node.state.services.get(young.id)
        assert shown and shown.name == f"web-{young.id[:6]}", "its name lasts"
        assert [port.published for port in shown.ports] == [8080], "the port is free again"


def test_a_service_made_in_a_network_that_was_removed_meanwhile_goes_with_it() -> None:
    cluster = Cluster(2, 3, FAIR)
    a, _, c = cluster.nodes.values()
    a.state.create_network(parse_network("net", subnets=["10.1.0.0/24"]))
    settle(cluster, 2.0)
    run_one(c, "w")
    held = next(iter(c.state.members.values())).local
    c.state.remove_endpoints(list(held))
    settle(cluster, 2.0)
    cluster.partition({c.id}, one_way=False)
    a.state.remove_network("net")
    make(c, "web")
    settle(cluster)
    assert [list(node.state.services.all()) for node in cluster.nodes.values()] == [[], [], []]


@pytest.mark.parametrize("seed", range(12))
def test_under_a_random_load_all_come_to_one_view(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(seed, rng.randint(2, 5), BAD)
    nodes = list(cluster.nodes.values())
    nodes[0].state.create_network(parse_network("net", subnets=["10.1.0.0/24"]))
    cluster.clock.run_until(cluster.clock.now + 3.0)
    done = 0

    def step() -> None:
        nonlocal done
        node = rng.choice(nodes)
        state = node.state
        services = sorted(s.id for s in state.services.all())
        own = sorted(id for m in state.members.values() for id in m.local)
        every = sorted(id for m in state.members.values() for id in m.all)
        action = rng.randrange(8)
        with contextlib.suppress(VxmeshError):
            if action <= 1:
                make(node, f"s{rng.randrange(4)}", published=rng.choice([0, 8080, 8081]))
            elif action == 2:
                run_one(node, f"e{rng.randrange(30)}")
            elif action == 3 and own:
                state.remove_endpoints([rng.choice(own)])
            elif action == 4 and services:
                state.remove_service(rng.choice(services))
            elif action == 5 and services and every:
                change = rng.choice([state.drain_backend, state.remove_backend])
                change(rng.choice(services), "", rng.choice(every))
            elif action == 6 and own:
                state.tell_health(rng.choice(own), rng.choice(["healthy", "unhealthy", ""]))
            elif action == 7 and services and every:
                state.add_backend(rng.choice(services), "", rng.choice(every), rng.randrange(9))
            else:
                return
            done += 1
        cluster.check_always()

    start = cluster.clock.now
    for _ in range(80):
        cluster.clock.at(start + rng.uniform(0, STORM), step)
    for _ in range(BAD.partitions):
        begin = rng.uniform(0, STORM)
        group = set(rng.sample(sorted(cluster.nodes), rng.randint(1, len(nodes) - 1)))
        cluster.clock.at(start + begin, lambda group=group: cluster.partition(group, False))  # type: ignore[misc]
        cluster.clock.at(start + begin + rng.uniform(1, 8), cluster.heal)
    cluster.clock.run_until(start + STORM)
    settle(cluster)
    assert done > 20, "nothing happened"
