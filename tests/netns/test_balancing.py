"""Services on the real kernel: VIPs and published ports, with the client's own address kept.

By the rules of nftables, and what is central by the programs at connect(2) as well, of which
test_socketbalancing.py has the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.drivers.balancing import Backend, Frontend
from agent.notation import parse_address
from tests.netns.balancing_hosts import (
    NEVER,
    Client,
    Over,
    Server,
    add_address,
    ask,
    backend,
    forget_all,
    frontend,
    network,
    refused,
    serve,
    tracked,
    udp_targets,
    withdraw,
)
from tests.netns.datapath_hosts import Fabric, Host, Sandbox, opened, restart, run, until

OUTSIDER = "10.98.0.9"
PUBLISHED = ((b"", 8000),)
BOTH = pytest.mark.parametrize("protocol", ["tcp", "udp"])
EACH = pytest.mark.parametrize("over", [Over(4), Over(4, "udp"), Over(6), Over(6, "udp")], ids=str)
FAMILIES = pytest.mark.parametrize("over", [Over(4), Over(6)], ids=str)


EITHER_WAY = pytest.mark.parametrize(
    "fabric", [False, True], indirect=True, ids=["nftables", "sockets"]
)


@pytest.fixture
async def fabric(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Fabric]:
    at_sockets = getattr(request, "param", False)
    async with opened(tmp_path, at_sockets=at_sockets) as fabric:
        assert [is_at_sockets(host) for host in fabric.hosts] == [at_sockets] * len(fabric.hosts)
        yield fabric


def is_at_sockets(host: Host) -> bool:
    """Whether a host balances at connect(2), and not by the rules alone."""
    applier = host.reconciler._applier
    assert applier
    return applier.serving.sockets.is_on


def ended(host: Host) -> type[OSError]:
    """What a sandbox there hears of its connection by a VIP when the backend has gone for good."""
    return ConnectionAbortedError if is_at_sockets(host) else ConnectionResetError


def published(over: Over, *backends: Backend) -> Frontend:
    """A service at its VIP and at a port of every host."""
    return frontend(*backends, protocol=over.protocol, published=PUBLISHED, vip=over.vip)


@EACH
async def test_a_vip_leads_to_a_backend_on_another_host_which_sees_the_client_itself(
    fabric: Fabric, over: Over
) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(
        fabric.hosts,
        frontend(backend(fabric.b, 3, version=over.version), protocol=over.protocol, vip=over.vip),
    )
    await fabric.settle()
    async with Server(far.path, "far", address=over.any):
        assert await ask(near.path, over.vip, 80, over.protocol) == ("far", over.box(2))


@EACH
async def test_a_vip_leads_to_a_backend_on_the_same_host(fabric: Fabric, over: Over) -> None:
    one, two = await network(fabric, fabric.a, fabric.a)
    serve(
        fabric.hosts,
        frontend(backend(fabric.a, 3, version=over.version), protocol=over.protocol, vip=over.vip),
    )
    await fabric.settle()
    async with Server(two.path, "two", address=over.any):
        assert await ask(one.path, over.vip, 80, over.protocol) == ("two", over.box(2))
        assert one.ping(over.vip)


@BOTH
async def test_a_backend_reaches_itself_by_its_vip_and_by_a_published_port(
    fabric: Fabric, protocol: str
) -> None:
    (box,) = await network(fabric, fabric.a)
    one = frontend(backend(fabric.a, 2), protocol=protocol, published=PUBLISHED)
    serve(fabric.hosts, one)
    await fabric.settle()
    async with Server(box.path, "box"):
        assert await ask(box.path, "10.7.0.100", 80, protocol) == ("box", "10.7.0.100")
        assert (await ask(box.path, "10.99.0.1", 8000, protocol))[0] == "box"
        assert (await ask(box.path, "10.98.0.1", 8000, protocol))[0] == "box"


@EACH
async def test_a_published_port_leads_to_a_backend_elsewhere_which_sees_the_client_itself(
    fabric: Fabric, over: Over
) -> None:
    (far,) = await network(fabric, fabric.b)  # host a has none of its own
    serve(fabric.hosts, published(over, backend(fabric.b, 2, version=over.version)))
    await fabric.settle()
    async with Server(far.path, "far", address=over.any):
        assert await ask(fabric.outsider, over.node, 8000, over.protocol) == (
            "far",
            over.outsider(),
        )


@EACH
async def test_a_published_port_leads_to_a_backend_of_the_same_host(
    fabric: Fabric, over: Over
) -> None:
    (box,) = await network(fabric, fabric.a)
    serve(fabric.hosts, published(over, backend(fabric.a, 2, version=over.version)))
    await fabric.settle()
    async with Server(box.path, "box", address=over.any):
        assert await ask(fabric.outsider, over.node, 8000, over.protocol) == (
            "box",
            over.outsider(),
        )


@BOTH
async def test_a_published_port_is_reached_from_the_host_itself_and_from_sandboxes(
    fabric: Fabric, protocol: str
) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(fabric.hosts, frontend(backend(fabric.b, 3), protocol=protocol, published=PUBLISHED))
    await fabric.settle()
    async with Server(far.path, "far"):
        assert await ask(fabric.a.path, "10.99.0.1", 8000, protocol) == ("far", "10.99.0.1")
        assert (await ask(fabric.a.path, "127.0.0.1", 8000, protocol))[0] == "far"
        assert await ask(fabric.a.path, "10.99.0.2", 8000, protocol) == ("far", "10.99.0.1")
        assert (await ask(near.path, "10.99.0.1", 8000, protocol))[0] == "far"
        assert (await ask(near.path, "10.99.0.2", 8000, protocol))[0] == "far"
        assert (await ask(far.path, "10.99.0.1", 8000, protocol))[0] == "far"


@EACH
async def test_three_clients_at_once_are_each_seen_with_their_own_address(
    fabric: Fabric, over: Over
) -> None:
    addresses = [over.outsider(n) for n in (9, 10, 11)]
    for address in addresses[1:]:
        add_address(fabric.outsider, address)
    near, far = await network(fabric, fabric.a, fabric.b)
    backends = (
        backend(fabric.a, 2, version=over.version),
        backend(fabric.b, 3, version=over.version),
    )
    serve(fabric.hosts, published(over, *backends))
    await fabric.settle()

    async def client(address: str) -> set[str]:
        names = set()
        for _ in range(20):
            asking = Client(fabric.outsider, over.protocol, over.version, address)
            await asking.connect(over.node, 8000)
            for _ in range(3):
                name, seen = await asking.ask()
                assert seen == address
                names.add(name)
            asking.close()
        return names

    async with (
        Server(near.path, "near", address=over.any),
        Server(far.path, "far", address=over.any),
    ):
        for names in await asyncio.gather(*map(client, addresses)):
            assert names == {"near", "far"}  # all 20 at one of them: once in a million


@EACH
async def test_without_a_backend_a_client_is_refused_at_once(fabric: Fabric, over: Over) -> None:
    (box,) = await network(fabric, fabric.a)
    serve(fabric.hosts, published(over))
    await fabric.settle()
    assert await refused(box.path, over.vip, 80, over.protocol)
    assert await refused(box.path, over.vip, 81, over.protocol)
    assert await refused(fabric.outsider, over.node, 8000, over.protocol)
    serve(fabric.hosts, replace(published(over), refuse=False))
    await fabric.settle()
    assert not await refused(box.path, over.vip, 80, over.protocol, NEVER)


@EITHER_WAY
@FAMILIES
async def test_a_draining_backend_keeps_its_connections_and_gets_no_new_one(
    fabric: Fabric, over: Over
) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    old, new = (
        backend(fabric.a, 2, version=over.version),
        backend(fabric.b, 3, version=over.version),
    )
    serve(fabric.hosts, frontend(old, published=PUBLISHED, vip=over.vip))
    await fabric.settle()
    async with (
        Server(near.path, "old", address=over.any),
        Server(far.path, "new", address=over.any),
    ):
        inside = await Client(far.path, version=over.version).connect(over.vip, 80)
        outside = await Client(fabric.outsider, version=over.version).connect(over.node, 8000)
        assert await inside.ask() == ("old", over.box(3))
        assert await outside.ask() == ("old", over.outsider())
        serve(
            fabric.hosts,
            frontend(replace(old, draining=True), new, published=PUBLISHED, vip=over.vip),
        )
        await fabric.settle()
        for _ in range(10):
            assert (await ask(far.path, over.vip, 80))[0] == "new"
            assert (await ask(fabric.outsider, over.node, 8000))[0] == "new"
        assert await inside.ask() == ("old", over.box(3))
        assert await outside.ask() == ("old", over.outsider())
        inside.close()
        outside.close()


@EITHER_WAY
@FAMILIES
async def test_connections_go_on_when_the_agent_starts_again(fabric: Fabric, over: Over) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(
        fabric.hosts,
        frontend(backend(fabric.b, 3, version=over.version), published=PUBLISHED, vip=over.vip),
    )
    await fabric.settle()
    async with Server(far.path, "far", address=over.any):
        inside = await Client(near.path, version=over.version).connect(over.vip, 80)
        outside = await Client(fabric.outsider, version=over.version).connect(over.node, 8000)
        for host in fabric.hosts:
            await restart(host)
            assert await inside.ask() == ("far", over.box(2))
            assert await outside.ask() == ("far", over.outsider())
        assert await ask(fabric.outsider, over.node, 8000) == ("far", over.outsider())
        inside.close()
        outside.close()


@EITHER_WAY
@FAMILIES
async def test_connections_are_shared_out_by_weight(fabric: Fabric, over: Over) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    light, heavy = (
        backend(fabric.a, 2, version=over.version),
        backend(fabric.b, 3, version=over.version, weight=3),
    )
    serve(fabric.hosts, frontend(light, heavy, vip=over.vip))
    await fabric.settle()
    async with (
        Server(near.path, "light", address=over.any),
        Server(far.path, "heavy", address=over.any),
    ):
        names: list[str] = []
        # A quarter is to be expected. Of 400, 30 more or fewer are 3.5 standard deviations, which
        # comes by chance in one run of 2,000; of 800 it is the same share once in a million.
        for _ in range(2):
            names += [(await ask(near.path, over.vip, 80))[0] for _ in range(400)]
            share = names.count("light") / len(names)
            if 0.175 <= share <= 0.325:
                break
    assert 0.175 <= share <= 0.325


@FAMILIES
async def test_with_affinity_a_client_stays_with_its_backend(fabric: Fabric, over: Over) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    one = frontend(
        backend(fabric.a, 2, version=over.version),
        backend(fabric.b, 3, version=over.version),
        affinity=60,
        published=PUBLISHED,
        vip=over.vip,
    )
    serve(fabric.hosts, one)
    await fabric.settle()
    found = set()
    async with (
        Server(near.path, "near", address=over.any),
        Server(far.path, "far", address=over.any),
    ):
        for number in range(10, 22):
            address = over.outsider(number)
            add_address(fabric.outsider, address)
            names = set()
            for _ in range(5):
                client = Client(fabric.outsider, version=over.version, source=address)
                await client.connect(over.node, 8000)
                names.add((await client.ask())[0])
                client.close()
            assert len(names) == 1
            found |= names
    assert found == {"near", "far"}


@EITHER_WAY
@FAMILIES
async def test_prefer_local_leaves_a_host_only_when_there_is_none(
    fabric: Fabric, over: Over
) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    here, there = (
        backend(fabric.a, 2, version=over.version),
        backend(fabric.b, 3, version=over.version),
    )
    serve(fabric.hosts, frontend(here, there, prefer_local=True, vip=over.vip))
    await fabric.settle()
    async with (
        Server(near.path, "near", address=over.any),
        Server(far.path, "far", address=over.any),
    ):
        for _ in range(10):
            assert (await ask(near.path, over.vip, 80))[0] == "near"
            assert (await ask(far.path, over.vip, 80))[0] == "far"
        gone = replace(here, draining=True)
        serve(fabric.hosts, frontend(gone, there, prefer_local=True, vip=over.vip))
        await fabric.settle()
        assert (await ask(near.path, over.vip, 80))[0] == "far"


@FAMILIES
@pytest.mark.parametrize("chain", ["forward", "input"])
async def test_a_drop_rule_of_the_host_keeps_clients_from_a_published_port(
    fabric: Fabric, over: Over, chain: str
) -> None:
    (box,) = await network(fabric, fabric.a)
    serve(
        fabric.hosts,
        frontend(backend(fabric.a, 2, version=over.version), published=PUBLISHED, vip=over.vip),
    )
    await fabric.settle()
    async with Server(box.path, "box", address=over.any):
        assert await ask(fabric.outsider, over.node, 8000) == ("box", over.outsider())
        rules = (
            f"table inet filter {{ chain {chain} {{ type filter hook {chain} priority filter; "
            "iifname { side, side6 } tcp dport 8000 drop; }\n}"
        )
        fabric.a.run("nft", "-f", "-", text=rules)
        with pytest.raises(TimeoutError):
            await ask(fabric.outsider, over.node, 8000, timeout=NEVER)
        fabric.a.run("nft", "delete", "table", "inet", "filter")
        assert await ask(fabric.outsider, over.node, 8000) == ("box", over.outsider())


@EACH
async def test_an_internal_networks_service_is_reached_by_its_published_port(
    fabric: Fabric, over: Over
) -> None:
    for host in fabric.hosts:
        host.add_network(7, internal=True)
    box = Sandbox(fabric)
    fabric.b.add_port(7, 2, box, gateways=())
    await network(fabric)
    serve(fabric.hosts, published(over, backend(fabric.b, 2, version=over.version)))
    await fabric.settle()
    async with Server(box.path, "box", address=over.any):
        if over.protocol == "tcp":
            assert await ask(fabric.outsider, over.node, 8000) == ("box", over.outsider())
    assert not box.ping("10.99.0.1")


async def test_one_port_at_two_addresses_leads_to_two_services(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    one = frontend(
        backend(fabric.a, 2), name="one", published=((parse_address("10.98.0.1"), 8000),)
    )
    two = frontend(
        backend(fabric.b, 3), name="two", vip="", published=((parse_address("10.99.0.1"), 8000),)
    )
    serve(fabric.hosts, one, two)
    await fabric.settle()
    run("ip", "route", "add", "10.99.0.0/24", "via", "10.98.0.1", netns=fabric.outsider)
    async with Server(near.path, "near"), Server(far.path, "far"):
        assert await ask(fabric.outsider, "10.98.0.1", 8000) == ("near", OUTSIDER)
        assert await ask(fabric.outsider, "10.99.0.1", 8000) == ("far", OUTSIDER)


@EITHER_WAY
@FAMILIES
async def test_a_sandbox_of_another_network_does_not_reach_a_vip(
    fabric: Fabric, over: Over
) -> None:
    (box,) = await network(fabric, fabric.a)
    (stranger,) = await network(fabric, fabric.a, vni=8, first=2)
    serve(fabric.hosts, frontend(backend(fabric.a, 2, version=over.version), vip=over.vip))
    await fabric.settle()
    async with Server(box.path, "box", address=over.any):
        assert (await ask(box.path, over.vip, 80))[0] == "box"
        with pytest.raises((TimeoutError, OSError)):
            await ask(stranger.path, over.vip, 80, timeout=NEVER)


@EITHER_WAY
@FAMILIES
async def test_a_backend_that_goes_for_good_has_its_connections_reset_at_once(
    fabric: Fabric,
    over: Over,
) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    old, new = (
        backend(fabric.a, 2, version=over.version),
        backend(fabric.b, 3, version=over.version),
    )
    serve(fabric.hosts, frontend(old, published=PUBLISHED, vip=over.vip))
    await fabric.settle()
    async with (
        Server(near.path, "old", address=over.any),
        Server(far.path, "new", address=over.any),
    ):
        clients = [
            await Client(far.path, version=over.version).connect(over.vip, 80),
            await Client(fabric.outsider, version=over.version).connect(over.node, 8000),
            await Client(fabric.a.path, version=over.version).connect(over.own, 8000),
        ]
        for client in clients:
            assert (await client.ask())[0] == "old"
        serve(fabric.hosts, frontend(new, published=PUBLISHED, vip=over.vip))
        await fabric.settle()
        # None of whom says a word; only the sandbox may have been led at its socket.
        hears = [ended(fabric.b), ConnectionResetError, ConnectionResetError]
        for client, what in zip(clients, hears, strict=True):
            with pytest.raises(what):
                await client.wait()
            client.close()
        assert (await ask(fabric.outsider, over.node, 8000))[0] == "new"


@FAMILIES
async def test_a_connection_lives_across_a_change_of_other_backends(
    fabric: Fabric, over: Over
) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    stays, goes = (
        backend(fabric.a, 2, version=over.version),
        backend(fabric.b, 3, version=over.version),
    )
    serve(fabric.hosts, frontend(stays, published=PUBLISHED, vip=over.vip))
    await fabric.settle()
    async with (
        Server(near.path, "stays", address=over.any),
        Server(far.path, "goes", address=over.any),
    ):
        client = await Client(fabric.outsider, version=over.version).connect(over.node, 8000)
        for backends in ((stays, goes), (stays,), (stays, goes)):
            serve(fabric.hosts, frontend(*backends, published=PUBLISHED, vip=over.vip))
            await fabric.settle()
            assert await client.ask() == ("stays", over.outsider())
        client.close()


async def test_udp_goes_to_another_backend_at_once_when_its_own_is_gone(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    old, new = backend(fabric.a, 2), backend(fabric.b, 3)
    serve(fabric.hosts, frontend(old, protocol="udp", published=PUBLISHED))
    await fabric.settle()
    async with Server(near.path, "old"), Server(far.path, "new"):
        inside = await Client(far.path, "udp").connect("10.7.0.100", 80)
        outside = await Client(fabric.outsider, "udp").connect("10.98.0.1", 8000)
        assert [(await c.ask())[0] for c in (inside, outside)] == ["old", "old"]
        serve(fabric.hosts, frontend(new, protocol="udp", published=PUBLISHED))
        await fabric.settle()
        assert [(await c.ask())[0] for c in (inside, outside)] == ["new", "new"]
        inside.close()
        outside.close()


async def test_udp_that_came_before_its_port_was_published_arrives_after(fabric: Fabric) -> None:
    (box,) = await network(fabric, fabric.a)
    async with Server(box.path, "box"):
        client = await Client(fabric.outsider, "udp").connect("10.98.0.1", 8000)
        with pytest.raises(ConnectionRefusedError):
            await client.ask()
        one = frontend(backend(fabric.a, 2), protocol="udp", published=PUBLISHED)
        serve(fabric.hosts, one)
        await fabric.settle()
        assert await client.ask() == ("box", OUTSIDER)
        client.close()


async def test_what_leads_elsewhere_by_a_published_port_is_not_forgotten(fabric: Fabric) -> None:
    """Publishing 53/udp must not cut the host's own questions to its name servers."""
    near, _ = await network(fabric, fabric.a, fabric.b)
    host, outsider = fabric.a, fabric.outsider
    async with Server(outsider, "outside", port=8000):
        going = await Client(host.path, "udp").connect("10.98.0.9", 8000)
        assert (await going.ask())[0] == "outside"
        coming = await Client(outsider, "udp").connect("10.98.0.1", 8000)
        with pytest.raises(ConnectionRefusedError):
            await coming.ask()
        ends = await asyncio.to_thread(udp_targets, host.path, 8000)
        assert ends == {"10.98.0.9", "10.98.0.1"}
        serve(fabric.hosts, frontend(backend(host, 2), protocol="udp", published=PUBLISHED))
        await fabric.settle()
        assert await asyncio.to_thread(udp_targets, host.path, 8000) == {"10.98.0.9"}
        going.close()
        coming.close()
    assert near


async def test_a_connection_that_tracking_forgot_is_reset(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(fabric.hosts, frontend(backend(fabric.b, 3), published=PUBLISHED))
    await fabric.settle()
    async with Server(far.path, "far"):
        clients = [
            await Client(near.path).connect("10.7.0.100", 80),
            await Client(fabric.outsider).connect("10.98.0.1", 8000),
        ]
        for client in clients:
            await client.ask()
        forget_all(fabric.a.own)
        for client in clients:
            with pytest.raises(ConnectionResetError):
                await client.ask()
            client.close()


@EITHER_WAY
async def test_what_went_while_the_agent_was_away_is_reset_when_it_starts(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    old, new = backend(fabric.a, 2), backend(fabric.b, 3)
    serve(fabric.hosts, frontend(old))
    await fabric.settle()
    async with Server(near.path, "old"), Server(far.path, "new"):
        client = await Client(far.path).connect("10.7.0.100", 80)
        await client.ask()
        await fabric.b.reconciler.stop()
        fabric.b.desired.services = {frontend(new).id: frontend(new)}
        await fabric.b.make().start()
        with pytest.raises(ended(fabric.b)):
            await client.wait()
        assert (await ask(far.path, "10.7.0.100", 80))[0] == "new"
        client.close()


async def test_what_others_change_in_the_rules_is_put_back(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(fabric.hosts, frontend(backend(fabric.b, 3)))
    await fabric.settle()
    async with Server(far.path, "far"):
        rules = "table inet vxmesh_balance"
        fabric.a.inside("nft", "flush", "map", *rules.split()[1:], "slots4")
        far.run("nft", "delete", "table", "inet", "vxmesh_replies_2")
        far.run("ip", "rule", "delete", "priority", "83")
        for host in fabric.hosts:
            host.reconciler.audit()
        await fabric.settle()
        assert await ask(near.path, "10.7.0.100", 80) == ("far", "10.7.0.2")
        assert fabric.a.reconciler.repairs["nft"] == 1
        assert fabric.b.reconciler.repairs["port"] >= 2


async def test_the_way_back_goes_from_sandboxes_when_the_last_service_goes(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    one = frontend(backend(fabric.b, 3))
    assert "vxmesh" not in far.run("nft", "list", "tables")
    serve(fabric.hosts, one)
    await fabric.settle()
    assert "vxmesh" in far.run("nft", "list", "tables")
    withdraw(fabric.hosts, one)
    await fabric.settle()
    assert "vxmesh" not in far.run("nft", "list", "tables")
    assert "836" not in far.run("ip", "rule")
    assert await refused(near.path, "10.7.0.3", 8080)


async def test_with_strict_reverse_path_filtering_published_ports_work_as_well(
    fabric: Fabric,
) -> None:
    (box,) = await network(fabric, fabric.a)
    run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1", netns=fabric.a.path)
    serve(fabric.hosts, frontend(backend(fabric.a, 2), published=PUBLISHED))
    await restart(fabric.a)
    async with Server(box.path, "box"):
        assert await ask(fabric.outsider, "10.98.0.1", 8000) == ("box", OUTSIDER)
        assert (await ask(fabric.a.path, "127.0.0.1", 8000))[0] == "box"


async def test_only_what_is_balanced_is_tracked(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    serve(fabric.hosts, frontend(backend(fabric.b, 3)))
    await fabric.settle()
    async with Server(far.path, "far"):
        await ask(near.path, "10.7.0.3", 8080)
        assert near.ping("10.99.0.1") and near.ping("10.7.0.1")
        assert tracked(fabric.a.own) == 0
        await ask(near.path, "10.7.0.100", 80)
        assert tracked(fabric.a.own) == 1


async def test_a_new_sandbox_has_the_way_back_before_it_is_a_backend(fabric: Fabric) -> None:
    await network(fabric, fabric.a)
    serve(fabric.hosts, frontend(backend(fabric.a, 2)))
    await fabric.settle()
    box = Sandbox(fabric)
    fabric.b.add_port(7, 9, box)
    await fabric.b.reconciler.settle()
    assert "vxmesh_replies" in box.run("nft", "list", "tables")


async def test_all_that_is_ours_on_a_host_goes_when_it_is_removed(fabric: Fabric) -> None:
    await network(fabric, fabric.a)
    serve(fabric.hosts, frontend(backend(fabric.a, 2), published=PUBLISHED))
    await fabric.settle()
    assert "table ip vxmesh" in fabric.a.run("nft", "list", "tables")
    await fabric.a.reconciler.remove_all()
    assert "vxmesh" not in fabric.a.run("nft", "list", "tables")


async def test_over_ipv6_a_gone_backends_connections_are_reset_too(fabric: Fabric) -> None:
    near, far = await network(fabric, fabric.a, fabric.b)
    over6 = replace(backend(fabric.b, 3), address=parse_address("fd00:7::3"))
    serve(fabric.hosts, frontend(over6, vip="fd00:7::100", published=PUBLISHED))
    await fabric.settle()
    async with Server(far.path, "far", address="::"):
        clients = [
            await Client(near.path, version=6).connect("fd00:7::100", 80),
            await Client(fabric.outsider, version=6).connect("fd98::1", 8000),
        ]
        for client in clients:
            assert (await client.ask())[0] == "far"
        serve(fabric.hosts, frontend(vip="fd00:7::100", published=PUBLISHED))
        await fabric.settle()
        for client in clients:
            with pytest.raises(ConnectionResetError):
                await client.wait()
            client.close()


async def test_published_ports_work_again_when_the_uplink_was_deleted(fabric: Fabric) -> None:
    (box,) = await network(fabric, fabric.a)
    serve(fabric.hosts, frontend(backend(fabric.a, 2), published=PUBLISHED))
    await fabric.settle()
    before = fabric.a.reconciler.repairs["link"]
    fabric.a.run("ip", "link", "delete", "vxmesh0")
    await until(lambda: fabric.a.reconciler.repairs["link"] > before, "the uplink is put back")
    await fabric.settle()
    async with Server(box.path, "box"):
        assert await ask(fabric.outsider, "10.98.0.1", 8000) == ("box", OUTSIDER)
