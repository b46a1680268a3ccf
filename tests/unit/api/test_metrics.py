"""What is counted and what is looked at, and that the documentation has all of it."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import pytest

from agent.api import metrics as module
from agent.api.metrics import COUNTED, RESOLVER, SPECS, Metrics, Sources
from agent.api.metricserver import MetricServer
from agent.cli.metrics import parse
from agent.core.seals import REASONS
from agent.errors import Conflict, Unavailable
from agent.model import Node
from agent.node import NodeState
from agent.requests import parse_endpoint, parse_network
from agent.servicemodel import Port
from agent.servicespec import ServiceSpec
from agent.views import Status

DOCS = Path(__file__).resolve().parents[3] / "docs"

Found = dict[tuple[str, str], float]


@pytest.fixture
def node() -> NodeState:
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    made = NodeState(me, lambda: 1000.0, random.Random(1))
    made.describe(me)
    return made


async def counters() -> Mapping[str, int]:
    return {name: number for number, name in enumerate(RESOLVER, 1)}


@pytest.fixture
def metrics(node: NodeState) -> Metrics:
    refused = {"expired": 2, "foreign": 0}
    sources = Sources(
        lambda: 3,
        lambda: 4,
        counters,
        ("fdb", "nft"),
        peer_refused=lambda: refused,
        refused=lambda: {"mac": 5},
        records_refused=lambda: node.refused,
    )
    return Metrics(node, sources)


async def look(metrics: Metrics) -> Found:
    """(name, the values of its labels) -> value."""
    series = parse((await metrics.text()).decode())
    found = {(s["name"], ",".join(s["labels"].values())): s["value"] for s in series}
    assert len(found) == len(series)
    return found


async def test_what_is_looked_at(node: NodeState, metrics: Metrics) -> None:
    other = Node("b" * 16, "n2", "10.99.0.2", 7946, "10.99.0.2", 4789, "0", 0.0, 1500)
    node.nodes[other.id] = other
    node.set_status(other.id, Status("suspect", "", 0.0))
    for name, endpoints in (("web", 2), ("empty", 0)):
        network = node.create_network(parse_network(name))
        for number in range(endpoints):
            node.create_endpoint(network.id, parse_endpoint(f"e{number}"))
    node.refused["altered"] += 2
    found = await look(metrics)
    refused = [found["vxmesh_records_refused_total", reason] for reason in REASONS]
    assert refused == [2 * (reason == "altered") for reason in REASONS]
    assert (found["vxmesh_nodes", "suspect"], found["vxmesh_nodes", "alive"]) == (1, 1)
    assert found["vxmesh_networks", ""] == 2
    assert (found["vxmesh_endpoints", "web"], found["vxmesh_endpoints", "empty"]) == (2, 0)
    assert found["vxmesh_endpoints_local", ""] == 2
    assert (found["vxmesh_kernel_failures", ""], found["vxmesh_peer_streams", ""]) == (3, 4)
    assert found["vxmesh_peer_refused_total", "expired"] == 2
    assert found["vxmesh_peer_refused_total", "foreign"] == 0
    assert found["vxmesh_replica_records", ""] == node.replica.count() >= 5
    assert found["vxmesh_resolver_up", ""] == 1
    assert found["vxmesh_resolver_questions_total", "udp"] == (await counters())["udp"]
    assert found["process_resident_memory_bytes", ""] > 1e6


async def test_notices_count(node: NodeState, metrics: Metrics) -> None:
    found = await look(metrics)
    assert found["vxmesh_drift_repaired_total", "fdb"] == 0  # there before anything happens
    node.tell("drift.repaired", "12 FDB rows put back", kind="fdb", count="12", networks="web")
    node.tell("drift.repaired", "1 FDB row put back", kind="fdb", count="1", networks="")
    node.tell("space.low", "web is 80 % full", network="web")
    found = await look(metrics)
    assert found["vxmesh_drift_repaired_total", "fdb"] == 13
    assert found["vxmesh_drift_repaired_total", "nft"] == 0
    assert found["vxmesh_notices_total", "drift.repaired"] == 2
    assert found["vxmesh_notices_total", "space.low"] == 1


async def test_probes_are_a_histogram(metrics: Metrics) -> None:
    for seconds in (0.0015, 0.002, 0.07, 9.0):  # a bound itself is within
        metrics.probes.observe(seconds)
    found = await look(metrics)
    bucket = "vxmesh_probe_seconds_bucket"
    assert (found[bucket, "0.001"], found[bucket, "0.002"], found[bucket, "0.003"]) == (0, 2, 2)
    assert (found[bucket, "0.08"], found[bucket, "5.0"], found[bucket, "+Inf"]) == (3, 3, 4)
    assert found["vxmesh_probe_seconds_count", ""] == 4
    assert found["vxmesh_probe_seconds_sum", ""] == pytest.approx(9.0735)


def test_what_counts_is_declared(metrics: Metrics) -> None:
    for name, labels, _ in COUNTED.values():
        assert SPECS[name][0] == labels
    for name, _ in RESOLVER.values():
        assert len(SPECS[name][0]) == 1
    with pytest.raises(KeyError):
        metrics.count("vxmesh_unheard_of_total")
    with pytest.raises(KeyError):
        metrics.count("vxmesh_drift_repaired_total", colour="red")


@pytest.mark.parametrize("error", [Unavailable("name server", "is gone"), EOFError(), None])
async def test_without_a_name_server(
    node: NodeState, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESOLVER_WITHIN", 0.01)

    async def silent() -> Mapping[str, int]:
        if error:
            raise error
        await asyncio.Event().wait()
        return {}

    found = await look(Metrics(node, Sources(resolver=silent)))
    assert found["vxmesh_resolver_up", ""] == 0
    assert not any(name.startswith("vxmesh_resolver_q") for name, _ in found)


async def test_the_loops_lag(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAG_EVERY", 0.001)
    monkeypatch.setattr(module, "LAG_WINDOW", 30.0)
    async with metrics.sampling():
        await asyncio.sleep(0.005)
        blocked_until = asyncio.get_running_loop().time() + 0.2
        while asyncio.get_running_loop().time() < blocked_until:
            pass  # what must never happen: the loop is blocked
        async with asyncio.timeout(10):
            while (await look(metrics))["vxmesh_loop_lag_seconds", ""] < 0.15:
                await asyncio.sleep(0.001)


async def test_connections_are_told_by_names(node: NodeState) -> None:
    network = node.create_network(parse_network("net"))
    for name in ("e", "f"):
        node.create_endpoint(network.id, parse_endpoint(name))
    service = node.create_service(ServiceSpec("web", network.id, ports=(Port(80, 80),)))
    ids = [node.find_endpoint(name, network.id)[1].endpoint.id for name in ("e", "f")]

    async def connections() -> Mapping[tuple[str, str], int]:
        return {(service.id, ids[0]): 7, (service.id, ids[1]): 0, (service.id, "gone"): 3}

    found = await look(Metrics(node, Sources(connections=connections)))
    told = {labels: v for (name, labels), v in found.items() if "service_connections" in name}
    assert told == {"e,net,web": 7, "f,net,web": 0}

    async def unreadable() -> Mapping[tuple[str, str], int]:
        raise Unavailable("the table", "is not there")

    found = await look(Metrics(node, Sources(connections=unreadable)))
    assert found["vxmesh_networks", ""] == 1, "the rest is told"


async def test_the_documentation_has_all_that_there_is(node: NodeState, metrics: Metrics) -> None:
    network = node.create_network(parse_network("web"))
    node.create_endpoint(network.id, parse_endpoint("e"))
    [endpoint] = node.members[network.id].all
    service = node.create_service(ServiceSpec("s", network.id, ports=(Port(80, 80),)))

    async def connections() -> Mapping[tuple[str, str], int]:
        return {(service.id, endpoint): 1}

    metrics.sources.connections = connections
    node.tell("a.b", "so that there is one of it")
    node.tell("join.refused", "and one of those", reason="wrong", count="1")
    rendered = parse((await metrics.text()).decode())
    shown = {(s["name"], tuple(sorted(s["labels"]))) for s in rendered}
    documented = set()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", (DOCS / "metrics.md").read_text(), re.M)
    for name, labels in rows:
        documented.add((name, tuple(sorted(re.findall(r"`(\w+)`", labels)))))
    assert documented == shown
    events = (DOCS / "events.md").read_text()
    assert all(f"| `{kind}` |" in events for kind in COUNTED)


async def test_it_is_served_over_http(metrics: Metrics) -> None:
    server, other = MetricServer(metrics), MetricServer(metrics)
    await server.start("127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{server.port}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/metrics") as answer:
                assert answer.status == 200
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert "vxmesh_networks 0.0\n" in await answer.text()
            async with session.get(f"{url}/") as answer:
                assert answer.status == 404
        with pytest.raises(Conflict, match="cannot be listened on"):
            await other.start("127.0.0.1", server.port)
    finally:
        await server.stop()
