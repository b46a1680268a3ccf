"""NetworkDriver over its socket: a whole life, and what is refused.

The cases are those of moby's libnetwork/drivers/remote/driver_test.go, from the other side.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.api.docker.bindings import Bound
from agent.api.docker.keeping import Keeper
from agent.api.docker.mirror import Mirror
from agent.core.replica import Delta, Record
from agent.errors import Conflict
from agent.model import Network, encode
from agent.node import NodeState
from agent.requests import parse_network
from tests.ports import free_port
from tests.unit.api.docker.conftest import Caller

NET, EP = "c" * 64, "e" * 64
POOL = {"Pool": "10.5.0.0/24", "Gateway": "10.5.0.1/24"}
ABOUT = {"NetworkID": NET, "EndpointID": EP}


async def network(engine: Caller, **more: Any) -> Any:
    return await engine.call("NetworkDriver.CreateNetwork", NetworkID=NET, IPv4Data=[POOL], **more)


async def test_the_whole_sequence(engine: Caller) -> None:
    assert await engine.call("Plugin.Activate") == {"Implements": ["NetworkDriver", "IpamDriver"]}
    assert await engine.call("NetworkDriver.GetCapabilities") == {
        "Scope": "local", "ConnectivityScope": "global",
    }  # fmt: skip
    assert await network(engine) == {}
    made = await engine.call(
        "NetworkDriver.CreateEndpoint", **ABOUT, Interface={"Address": "10.5.0.7/24"}
    )
    assert list(made["Interface"]) == ["MacAddress"]  # what was given is not given back
    assert await engine.call("NetworkDriver.EndpointOperInfo", **ABOUT) == {"Value": {}}
    joined = await engine.call("NetworkDriver.Join", **ABOUT, SandboxKey="/x", Options={})
    assert joined["Gateway"] == "10.5.0.1" and joined["DisableGatewayService"]
    assert joined["InterfaceName"]["DstPrefix"] == "eth"
    (sandbox,) = engine.node.sandboxes.values()
    assert joined["InterfaceName"]["SrcName"] == sandbox.ifnames[0]
    port = free_port()
    mapped = [{"Proto": 6, "Port": 80, "HostPort": port, "HostIP": "0.0.0.0"}]
    outward = {"com.docker.network.portmap": mapped}
    external = "NetworkDriver.ProgramExternalConnectivity"
    assert await engine.call(external, **ABOUT, Options=outward) == {}
    (publish,) = engine.node.sandboxes[sandbox.id].publishes
    assert (publish.host_port, publish.target_port) == (port, 80)
    assert await engine.call("NetworkDriver.RevokeExternalConnectivity", **ABOUT) == {}
    assert engine.node.sandboxes[sandbox.id].publishes == ()
    said = await engine.call("NetworkDriver.DeleteNetwork", NetworkID=NET)
    assert "has endpoints" in said["Err"]
    assert await engine.call("NetworkDriver.Leave", **ABOUT) == {}
    assert await engine.call("NetworkDriver.DeleteEndpoint", **ABOUT) == {}
    assert await engine.call("NetworkDriver.DeleteEndpoint", **ABOUT) == {}  # it is told twice
    assert await engine.call("NetworkDriver.DeleteNetwork", NetworkID=NET) == {}
    assert not engine.node.sandboxes and not list(engine.node.catalogue.all())
    assert not engine.bindings.all()
    for found in ("DiscoverNew", "DiscoverDelete"):
        node = {"DiscoveryType": 1, "DiscoveryData": {"Address": "192.0.2.9", "Self": False}}
        assert await engine.call(f"NetworkDriver.{found}", **node) == {}


async def test_a_container_that_publishes_nothing_changes_nothing_by_saying_so(
    engine: Caller,
) -> None:
    await network(engine)
    await engine.call("NetworkDriver.CreateEndpoint", **ABOUT, Interface={})
    changes: list[object] = []
    engine.node.listeners.append(changes.append)
    for call in ("ProgramExternalConnectivity", "RevokeExternalConnectivity"):
        assert await engine.call(f"NetworkDriver.{call}", **ABOUT, Options={}) == {}
    assert changes == []


@pytest.mark.parametrize(
    ("given", "answered"),
    [
        ({"Address": "10.5.0.7/24", "MacAddress": "02:00:00:00:00:07"}, set()),
        ({"Address": "10.5.0.7/24"}, {"MacAddress"}),
        ({"MacAddress": "02:00:00:00:00:07"}, {"Address"}),
        ({}, {"Address", "MacAddress"}),
        (None, {"Address", "MacAddress"}),
    ],
)
async def test_what_the_engine_leaves_out_is_chosen_and_told(
    engine: Caller, given: Any, answered: set[str]
) -> None:
    await network(engine)
    made = await engine.call("NetworkDriver.CreateEndpoint", **ABOUT, Interface=given)
    assert set(made["Interface"]) == answered
    if "Address" in answered:
        assert made["Interface"]["Address"].endswith("/24")


@pytest.mark.parametrize(
    ("method", "body", "why"),
    [
        ("CreateNetwork", {}, "malformed"),
        ("CreateNetwork", {"NetworkID": ""}, "missing"),
        ("CreateNetwork", {"NetworkID": 5}, "malformed"),
        ("CreateNetwork", {"NetworkID": NET, "IPv4Data": [{"Pool": "x"}]}, "malformed"),
        ("CreateNetwork", {"NetworkID": NET, "IPv4Data": "x"}, "malformed"),
        ("CreateNetwork", {"NetworkID": NET, "Options": {
            "com.docker.network.generic": {"com.docker.network.driver.mtu": "large"}}}, "number"),
        ("CreateNetwork", {"NetworkID": NET, "Options": {
            "com.docker.network.generic": {"vxmesh.network": "nowhere"}}}, "does not exist"),
        ("DeleteNetwork", {"NetworkID": NET}, "not known"),
        ("CreateEndpoint", {"NetworkID": NET, "EndpointID": EP}, "not known"),
        ("CreateEndpoint", {"NetworkID": NET, "EndpointID": ""}, "missing"),
        ("EndpointOperInfo", ABOUT, "not known"),
        ("Join", ABOUT, "not known"),
        ("Leave", {}, "malformed"),
        ("ProgramExternalConnectivity", ABOUT, "not known"),
    ],
)  # fmt: skip
async def test_what_cannot_be_done_is_said_and_changes_nothing(
    engine: Caller, method: str, body: dict[str, Any], why: str
) -> None:
    answer = await engine.call(f"NetworkDriver.{method}", **body)
    assert why in answer["Err"] and answer["Error"] == answer["Err"]
    assert not list(engine.node.catalogue.all()) and not engine.node.sandboxes


async def test_options_are_those_of_a_network_of_ours(engine: Caller) -> None:
    given = {"flood": "on", "flood-rate": "50"}
    generic = {"com.docker.network.generic": given}
    assert await network(engine, Options=generic) == {}
    (made,) = engine.node.catalogue.all()
    assert made.options == given
    await engine.call("NetworkDriver.DeleteNetwork", NetworkID=NET)
    given["flood"] = "yes"
    answer = await network(engine, Options=generic)
    assert "option flood='yes': is unknown" in answer["Err"]


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b"null", b"\xff", b'{"NetworkID": null}'])
async def test_what_is_no_request_is_said(engine: Caller, body: bytes) -> None:
    assert "malformed" in (await engine.raw("NetworkDriver.CreateNetwork", body))["Err"]


async def test_what_is_unknown_in_a_request_is_passed_over(engine: Caller) -> None:
    assert await network(engine, Novelty={"x": 1}, Options={"novel": [1]}) == {}
    made = await engine.call("NetworkDriver.CreateEndpoint", **ABOUT, Novelty=1)
    assert "Interface" in made


@pytest.mark.parametrize("method", ["NetworkDriver.Nonsense", "IpamDriver.Nonsense", "Nonsense"])
async def test_an_unknown_call_is_not_found(engine: Caller, method: str) -> None:
    assert await engine.call(method) == 404


async def test_an_endpoint_that_the_kernel_refuses_is_rolled_back(
    engine: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await network(engine)

    async def refuse(endpoint: str | None = None) -> None:
        raise Conflict("the kernel", "refuses")

    monkeypatch.setattr(engine.operations._kernel, "settle", refuse)
    made = await engine.call("NetworkDriver.CreateEndpoint", **ABOUT)
    assert "the kernel: refuses" in made["Err"]
    assert not engine.node.sandboxes
    assert all(not m.local for m in engine.node.members.values())


async def test_a_network_that_cannot_be_kept_is_rolled_back(
    engine: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(engine.bindings, "put", refuse)
    assert "No space left" in (await network(engine))["Err"]
    assert not list(engine.node.catalogue.all())


async def test_ports_of_which_one_is_taken_are_all_free_again(engine: Caller) -> None:
    await network(engine)
    await engine.call("NetworkDriver.CreateEndpoint", **ABOUT)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        free, taken = free_port(), other.getsockname()[1]
        mapped = [{"Proto": 6, "Port": 80, "HostPort": port} for port in (free, taken)]
        said = await engine.call(
            "NetworkDriver.ProgramExternalConnectivity",
            **ABOUT, Options={"com.docker.network.portmap": mapped},
        )  # fmt: skip
        assert str(taken) in said["Err"]
    with socket.socket() as again:
        again.bind(("", free))


async def test_an_internal_network_leads_to_name_servers_only(
    engine: Caller, tmp_path: Path
) -> None:
    data = [POOL, {"Pool": "fd00:5::/64", "Gateway": "fd00:5::1/64"}]
    internal = {"com.docker.network.internal": True}
    made = await engine.call(
        "NetworkDriver.CreateNetwork", NetworkID=NET, IPv4Data=data, Options=internal
    )
    assert made == {}
    await engine.call("NetworkDriver.CreateEndpoint", **ABOUT)
    engine.driver.resolv_conf = tmp_path / "resolv.conf"
    text = "nameserver 192.0.2.53\nnameserver 127.0.0.53\nnameserver 2001:db8::53\nnameserver\n"
    for content, found in (
        (text, [("192.0.2.53/32", "10.5.0.1"), ("2001:db8::53/128", "fd00:5::1")]),
        ("nameserver ::1\n", [("8.8.8.8/32", "10.5.0.1"), ("8.8.4.4/32", "10.5.0.1")]),
        ("nameserver 10.5.0.9\nnameserver x\n", []),  # it is on the network itself
    ):
        engine.driver.resolv_conf.write_text(content)
        joined = await engine.call("NetworkDriver.Join", **ABOUT)
        assert "Gateway" not in joined
        assert [(r["Destination"], r["NextHop"]) for r in joined["StaticRoutes"]] == found


@pytest.mark.parametrize("told", ["just now", "by the engine", "by the engine, elsewhere"])
async def test_a_container_in_several_networks_has_one_route_to_a_name_server(
    engine: Caller, tmp_path: Path, told: str
) -> None:
    netns = tmp_path / "netns"
    netns.touch()
    engine.driver.resolv_conf = tmp_path / "resolv.conf"
    engine.driver.resolv_conf.write_text("nameserver 192.0.2.53\n")
    abouts = []
    for number, internal in enumerate((False, True)):
        about = {"NetworkID": str(number) * 64, "EndpointID": str(number) * 64}
        pool = {"Pool": f"10.{number + 5}.0.0/24", "Gateway": f"10.{number + 5}.0.1/24"}
        await engine.call(
            "NetworkDriver.CreateNetwork", NetworkID=about["NetworkID"], IPv4Data=[pool],
            Options={"com.docker.network.internal": internal},
        )  # fmt: skip
        await engine.call("NetworkDriver.CreateEndpoint", **about)
        abouts.append(about)
    key = {"SandboxKey": str(netns)}

    async def routes(about: dict[str, str]) -> list[str]:
        joined = await engine.call("NetworkDriver.Join", **about, **key)
        return [r["NextHop"] for r in joined.get("StaticRoutes", ())]

    assert await routes(abouts[0]) == ["10.5.0.1"]  # also where it has the default route
    if told != "just now":  # and another agent since
        engine.driver._joined.clear()
        (sandbox,) = (s for s in engine.node.sandboxes.values() if s.name.startswith("docker-000"))
        path = str(netns) if told == "by the engine" else "/proc/1/ns/net"
        engine.node.put_sandbox(
            msgspec.structs.replace(sandbox, moved_to=path, moved_inode=netns.stat().st_ino)
        )
    assert await routes(abouts[1]) == []
    assert await routes(abouts[0]) == ["10.5.0.1"]  # it asks again, as it was not answered
    await engine.call("NetworkDriver.Leave", **abouts[0])
    await engine.call("NetworkDriver.DeleteEndpoint", **abouts[0])
    assert await routes(abouts[1]) == ["10.6.0.1"]


@pytest.mark.parametrize(
    ("pool", "space", "chosen_in"),
    [
        ("10.5.0.0/24", "LocalDefault", "10.5.0.128/25"),
        ("10.5.0.0/24", "vxmesh", ""),
        ("10.5.0.0/30", "LocalDefault", ""),
        ("fd00:5::/64", "LocalDefault", ""),
    ],
)
async def test_where_the_engine_chooses_from_below_we_choose_from_the_middle_up(
    engine: Caller, pool: str, space: str, chosen_in: str
) -> None:
    data = [{"Pool": pool, "AddressSpace": space}]
    made = await engine.call("NetworkDriver.CreateNetwork", NetworkID=NET, IPv4Data=data)
    assert made == {}
    (network,) = engine.node.catalogue.all()
    assert network.ip_range == chosen_in


async def test_a_subnet_that_is_taken_tells_of_our_ipam(engine: Caller) -> None:
    await network(engine)
    again = await engine.call("NetworkDriver.CreateNetwork", NetworkID="d" * 64, IPv4Data=[POOL])
    assert "overlaps" in again["Err"] and "--ipam-driver vxmesh" in again["Err"]


@pytest.mark.parametrize(("follows", "left"), [({}, 1), ({"vxmesh.follows": "true"}, 0)])
async def test_a_network_that_is_tied_goes_only_if_it_follows(
    engine: Caller, follows: dict[str, str], left: int
) -> None:
    await network(engine)
    (ours,) = engine.node.catalogue.all()
    generic = {"com.docker.network.generic": {"vxmesh.network": ours.id, **follows}}
    other = "d" * 64
    made = await engine.call("NetworkDriver.CreateNetwork", NetworkID=other, Options=generic)
    assert made == {}
    assert await engine.call("NetworkDriver.DeleteNetwork", NetworkID=other) == {}
    assert len(list(engine.node.catalogue.all())) == left


OTHER = "b" * 16


def foreign(node: NodeState, driver: str, creator: str) -> Network:
    """A network of `driver` that `creator` made, known here."""
    found = Network("f" * 16, "theirs", driver, ("10.5.0.0/24",), ("10.5.0.1",), "", 77, 0,
                    False, False, {}, {}, 1.0, creator, 1, False, 1)  # fmt: skip
    assert node.merge(Delta(creator, 0, 1, [Record("w/" + found.id, 1, encode(found))]))
    return node.find_network("theirs")


@pytest.mark.parametrize("driver", ["macvlan", "ipvlan", "bridge", "remote:acme"])
async def test_a_network_whose_interfaces_cannot_be_handed_out_is_not_bound(
    engine: Caller, driver: str
) -> None:
    theirs = foreign(engine.node, driver, OTHER)
    named = {"com.docker.network.generic": {"vxmesh.network": "theirs"}}
    said = await network(engine, Options=named)
    assert "network theirs" in said["Err"] and "overlay network" in said["Err"]
    assert not engine.bindings.all()
    # One that was bound by an agent before.
    await engine.bindings.put(NET, Bound(theirs.id, made=False))
    said = await engine.call("NetworkDriver.CreateEndpoint", **ABOUT)
    assert "network theirs" in said["Err"] and not engine.node.sandboxes
    members = engine.node.members.get(theirs.id)
    assert members is None or not members.local


@pytest.mark.parametrize("driver", ["overlay", "bridge"])
async def test_an_overlay_and_a_bridge_of_this_node_are_bound(engine: Caller, driver: str) -> None:
    spec = parse_network("ours", driver=driver, subnets=["10.5.0.0/24"])
    engine.node.create_network(spec)
    named = {"com.docker.network.generic": {"vxmesh.network": "ours"}}
    assert await network(engine, Options=named) == {}
    made = await engine.call("NetworkDriver.CreateEndpoint", **ABOUT)
    assert "Address" in made["Interface"]


async def test_a_network_that_is_asked_for_again_is_there_once(engine: Caller) -> None:
    assert await network(engine) == {}
    (made,) = engine.node.catalogue.all()
    assert await network(engine) == {}
    # The agent was killed before it had written down what it made.
    await engine.bindings.drop(NET)
    assert await network(engine) == {}
    assert [n.id for n in engine.node.catalogue.all()] == [made.id]
    assert engine.bindings.all() == {NET: Bound(made.id, made=True)}
    other = {"NetworkID": "d" * 64, "IPv4Data": [POOL]}
    assert "overlaps" in (await engine.call("NetworkDriver.CreateNetwork", **other))["Err"]
    # Ours was removed meanwhile, so it is made anew.
    engine.node.remove_network(made.id)
    assert await network(engine) == {}
    (fresh,) = engine.node.catalogue.all()
    assert engine.bindings.get(NET).network == fresh.id != made.id


async def test_an_endpoint_that_is_asked_for_again_is_there_once(engine: Caller) -> None:
    await network(engine)
    first, second = await asyncio.gather(
        *(engine.call("NetworkDriver.CreateEndpoint", **ABOUT) for _ in range(2))
    )
    assert first == second and set(first["Interface"]) == {"Address", "MacAddress"}
    assert await engine.call("NetworkDriver.CreateEndpoint", **ABOUT) == first
    assert len(engine.node.sandboxes) == 1
    wanted = {"Address": first["Interface"]["Address"]}
    again = await engine.call("NetworkDriver.CreateEndpoint", **ABOUT, Interface=wanted)
    assert again["Interface"] == {"MacAddress": first["Interface"]["MacAddress"]}
    other = {"Address": "10.5.0.99/24"}
    said = await engine.call("NetworkDriver.CreateEndpoint", **ABOUT, Interface=other)
    assert "other addresses" in said["Err"] and len(engine.node.sandboxes) == 1


async def test_what_was_made_for_no_network_goes_unless_it_is_asked_for(
    engine: Caller, tmp_path: Path
) -> None:
    await network(engine)
    (made,) = engine.node.catalogue.all()
    lists: Any = Lists()
    mirror = Mirror(engine.operations, engine.bindings, lists, Keeper(tmp_path), bool, bool)
    await mirror._once()
    assert list(engine.node.catalogue.all()) == [made]  # the engine is about to list it
    await engine.bindings.drop(NET)
    engine.bindings.making.add(NET)
    await mirror._once()
    assert list(engine.node.catalogue.all()) == [made]
    engine.bindings.making.clear()
    await mirror._once()
    assert not list(engine.node.catalogue.all())


class Lists:
    """An engine without a network."""

    async def networks(self) -> list[dict[str, Any]]:
        return []
