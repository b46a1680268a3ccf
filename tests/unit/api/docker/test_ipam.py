"""IpamDriver over its socket, with the cases of moby's libnetwork/ipams/remote/remote_test.go."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.api.docker.conftest import Caller

NET, EP = "c" * 64, "e" * 64
GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}


async def pool(engine: Caller, **body: Any) -> Any:
    return await engine.call("IpamDriver.RequestPool", AddressSpace="vxmesh", **body)


async def address(engine: Caller, pool: str, wanted: str = "", **options: str) -> Any:
    return await engine.call(
        "IpamDriver.RequestAddress", PoolID=pool, Address=wanted, Options=options
    )


async def network(engine: Caller, subnet: str, gateway: str) -> None:
    data = [{"AddressSpace": "vxmesh", "Pool": subnet, "Gateway": gateway}]
    made = await engine.call("NetworkDriver.CreateNetwork", NetworkID=NET, IPv4Data=data)
    assert made == {}


async def test_capabilities_and_spaces(engine: Caller) -> None:
    assert await engine.call("IpamDriver.GetCapabilities") == {
        "RequiresMACAddress": False, "RequiresRequestReplay": False,
    }  # fmt: skip
    spaces = await engine.call("IpamDriver.GetDefaultAddressSpaces")
    assert spaces["LocalDefaultAddressSpace"] and spaces["GlobalDefaultAddressSpace"]


async def test_the_whole_sequence(engine: Caller) -> None:
    made = await pool(engine)
    subnet = made["Pool"]
    gateway = (await address(engine, made["PoolID"], **GATEWAY))["Address"]
    assert gateway.endswith("/20")
    await network(engine, subnet, gateway)
    first = (await address(engine, made["PoolID"]))["Address"]
    second = (await address(engine, made["PoolID"]))["Address"]
    assert len({gateway, first, second}) == 3
    about = {"NetworkID": NET, "EndpointID": EP}
    created = await engine.call(
        "NetworkDriver.CreateEndpoint", **about, Interface={"Address": first}
    )
    assert set(created["Interface"]) == {"MacAddress"}
    # What an endpoint has is not to be had, what is only held neither, and both are free again.
    for taken in (first, second):
        assert "Err" in await address(engine, made["PoolID"], taken.split("/")[0])
    await engine.call("NetworkDriver.DeleteEndpoint", **about)
    for one in (first, second):
        bare = one.split("/")[0]
        release = {"PoolID": made["PoolID"], "Address": bare}
        assert await engine.call("IpamDriver.ReleaseAddress", **release) == {}
        assert await engine.call("IpamDriver.ReleaseAddress", **release) == {}  # told twice
        assert (await address(engine, made["PoolID"], bare))["Address"] == one
        await engine.call("IpamDriver.ReleaseAddress", **release)
    assert await engine.call("NetworkDriver.DeleteNetwork", NetworkID=NET) == {}
    assert await engine.call("IpamDriver.ReleasePool", PoolID=made["PoolID"]) == {}


async def test_equal_requests_have_equal_ids_and_others_have_not(engine: Caller) -> None:
    requests: list[dict[str, Any]] = [
        {"Pool": "10.5.0.0/16"},
        {"Pool": "10.6.0.0/16"},
        {"Pool": "10.5.0.0/16", "SubPool": "10.5.1.0/24"},
        {"Pool": "fd00:5::/64", "V6": True},
    ]
    ids = [(await pool(engine, **request))["PoolID"] for request in requests]
    assert len(set(ids)) == len(ids)
    assert ids == [(await pool(engine, **request))["PoolID"] for request in requests]


async def test_pools_that_are_chosen_are_apart(engine: Caller) -> None:
    chosen = [(await pool(engine))["Pool"] for _ in range(5)]
    assert len(set(chosen)) == 5
    assert ":" in (await pool(engine, V6=True))["Pool"]


async def test_an_ip_range_is_where_addresses_are_chosen(engine: Caller) -> None:
    made = await pool(engine, Pool="10.5.0.0/24", SubPool="10.5.0.240/28")
    assert made["Pool"] == "10.5.0.0/24"
    gateway = (await address(engine, made["PoolID"], "10.5.0.9", **GATEWAY))["Address"]
    assert gateway == "10.5.0.9/24"
    await network(engine, made["Pool"], gateway)
    found = [(await address(engine, made["PoolID"]))["Address"] for _ in range(15)]
    assert all(240 <= int(a.split(".")[3].split("/")[0]) < 255 for a in found)
    assert "no free address" in (await address(engine, made["PoolID"]))["Err"]


async def test_a_pool_of_a_network_that_is_there(engine: Caller) -> None:
    await network(engine, "10.5.0.0/24", "10.5.0.1/24")
    (ours,) = engine.node.catalogue.all()
    options = {"vxmesh.network": ours.id}
    made = await pool(engine, Options=options)
    assert made["Pool"] == "10.5.0.0/24"
    assert made == await pool(engine, Options=options, Pool="10.5.0.0/24")
    assert (await address(engine, made["PoolID"], **GATEWAY))["Address"] == "10.5.0.1/24"
    assert "Err" in await address(engine, made["PoolID"], "10.5.0.2", **GATEWAY)
    assert (await address(engine, made["PoolID"], "10.5.0.9"))["Address"] == "10.5.0.9/24"
    for wrong in ({"Pool": "10.6.0.0/24"}, {"V6": True}, {"Options": {"vxmesh.network": "x"}}):
        assert "Err" in await pool(engine, **{"Options": options, **wrong})


@pytest.mark.parametrize(
    ("method", "body", "why"),
    [
        ("RequestPool", {"AddressSpace": "vxmesh", "SubPool": "10.5.0.0/24"}, "needs its subnet"),
        ("RequestPool", {"AddressSpace": "other"}, "unknown"),
        ("RequestPool", {"Pool": "10.5.0.1/24"}, "host bits"),
        ("RequestPool", {"Pool": "x"}, "malformed"),
        ("RequestPool", {"Pool": "10.5.0.0/24", "SubPool": "10.6.0.0/24"}, "is not in"),
        ("RequestPool", {"Pool": "10.5.0.0/24", "SubPool": "fd00::/64"}, "is not in"),
        ("RequestPool", {"Pool": 5}, "malformed"),
        ("ReleasePool", {}, "malformed"),
        ("ReleasePool", {"PoolID": "never"}, "not known"),
        ("RequestAddress", {}, "malformed"),
        ("RequestAddress", {"PoolID": "never"}, "not known"),
        ("RequestAddress", {"PoolID": "new,10.5.0.0/24,", "Address": "10.6.0.1"}, "is not in"),
        ("RequestAddress", {"PoolID": "new,10.5.0.0/24,", "Address": "x"}, "malformed"),
        ("RequestAddress", {"PoolID": "new,10.5.0.0/24,"}, "does not exist"),
        ("ReleaseAddress", {"PoolID": "never", "Address": "10.5.0.1"}, "not known"),
    ],
)
async def test_what_cannot_be_done_is_said(
    engine: Caller, method: str, body: dict[str, Any], why: str
) -> None:
    answer = await engine.call(f"IpamDriver.{method}", **body)
    assert why in answer["Error"] and answer["Err"] == answer["Error"]
