"""What a plugin may do wrong in the middle of something: each row is a case of the protocol, and
after each of them there is nothing left of what was begun, at the plugin or here."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Timeout,
    Unavailable,
    Unsupported,
    VxmeshError,
)
from agent.model import Network
from agent.notation import format_address
from agent.remote.client import Refused
from agent.requests import parse_endpoint, parse_network
from agent.servicemodel import Port
from agent.servicespec import parse_service
from tests.unit.remote.standin import (
    BOX,
    MAC,
    Rig,
    Wrong,
    dies,
    does_and_dies,
    does_and_says,
    hangs,
    rig,
    says,
    slowly,
)

IPAM, NET = "IpamDriver", "NetworkDriver"
LONG = "x" * 600


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made


async def _network(world: Rig, driver: str = "remote:odd", **more: object) -> Network:
    spec = parse_network("net", driver=driver, ipam_driver="remote:odd", **more)  # type: ignore[arg-type]
    return await world.operations.create_network(spec)


async def _connect(world: Rig, **more: object) -> None:
    spec = parse_endpoint("box", **more)  # type: ignore[arg-type]
    await world.operations.create_endpoint("net", spec, sandbox="box")


NETWORKS = [
    # method, what the plugin does, error, a part of its text
    (f"{NET}.GetCapabilities", says({}), Invalid, "neither local nor global"),
    (f"{NET}.GetCapabilities", says({"Scope": "galaxy"}), Invalid, "neither local nor global"),
    (f"{NET}.GetCapabilities", dies, Unavailable, "does not answer"),
    (f"{IPAM}.GetDefaultAddressSpaces", says({"Error": "no"}), Refused, "no"),
    (f"{IPAM}.GetDefaultAddressSpaces", says([]), Refused, "refused"),
    (f"{IPAM}.GetDefaultAddressSpaces", says({"LocalDefaultAddressSpace": LONG}), Invalid, "long"),
    (f"{IPAM}.RequestPool", says({}), Invalid, "without a PoolID"),
    (f"{IPAM}.RequestPool", says({"Error": "full"}), Refused, "full"),
    (f"{IPAM}.RequestPool", says({"Err": "full"}, 500), Refused, "full"),
    (f"{IPAM}.RequestPool", says("<html>", 502), Refused, "<html>"),
    (f"{IPAM}.RequestPool", says({"PoolID": 7}), Invalid, "answered RequestPool"),
    (f"{IPAM}.RequestPool", says({"PoolID": LONG}), Invalid, "too long"),
    (f"{IPAM}.RequestPool", does_and_says(Pool="here"), Invalid, "malformed"),
    (f"{IPAM}.RequestPool", does_and_says(Pool="10.7.0.1/24"), Invalid, "host bits"),
    (f"{IPAM}.RequestPool", does_and_says(Pool="127.0.0.0/8"), Invalid, "is reserved"),
    (f"{IPAM}.RequestPool", does_and_says(Pool="fd00::/64"), Invalid, "asked for IPv4"),
    (f"{IPAM}.RequestPool", does_and_says(Pool="10.1.0.0/24"), Conflict, "overlaps"),
    (f"{IPAM}.RequestPool", does_and_says(Data={"com.docker.network.gateway": "10.9.0.1/24"}),
     Invalid, "is not in 10.7.0.0/24"),
    (f"{IPAM}.RequestPool", does_and_says(Data={"com.docker.network.gateway": 1}),
     Invalid, "no text"),
    (f"{IPAM}.RequestPool", does_and_says(Data=[1]), Invalid, "answered RequestPool"),
    (f"{IPAM}.RequestPool", hangs, Timeout, "has not answered"),
    (f"{IPAM}.RequestPool", dies, Unavailable, "does not answer"),
    (f"{IPAM}.RequestAddress", says({"Error": "no"}), Refused, "no"),
    (f"{IPAM}.RequestAddress", says({"Address": "10.9.0.1/24"}), Invalid, "is not in"),
    (f"{IPAM}.RequestAddress", says({"Address": "one"}), Invalid, "malformed"),
    (f"{IPAM}.RequestAddress", hangs, Timeout, "has not answered"),
    (f"{IPAM}.RequestAddress", dies, Unavailable, "does not answer"),
    (f"{NET}.CreateNetwork", says({"Err": "no"}), Refused, "no"),
    (f"{NET}.CreateNetwork", hangs, Timeout, "has not answered"),
    (f"{NET}.CreateNetwork", dies, Unavailable, "does not answer"),
    (f"{NET}.CreateNetwork", does_and_dies, Unavailable, "does not answer"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "wrong", "error", "text"), NETWORKS)
async def test_a_network_is_made_whole_or_not_at_all(
    world: Rig, method: str, wrong: Wrong, error: type[VxmeshError], text: str
) -> None:
    world.node.create_network(parse_network("there", subnets=["10.1.0.0/24"]))
    world.odd.wrong[method] = wrong
    with pytest.raises(error, match=text):
        await _network(world)
    world.odd.wrong.clear()
    assert [n.name for n in world.node.catalogue.all()] == ["there"]
    await world.nothing_left()
    await _network(world)


CONNECTS = [
    (f"{IPAM}.GetCapabilities", says({"RequiresMACAddress": "yes"}), Invalid, "GetCapabilities"),
    (f"{IPAM}.GetCapabilities", dies, Unavailable, "does not answer"),
    (f"{IPAM}.RequestAddress", says({}), Exhausted, "no free address"),
    (f"{IPAM}.RequestAddress", says({"Address": "0.0.0.0/0"}), Exhausted, "no free address"),
    (f"{IPAM}.RequestAddress", says({"Error": "no more"}), Refused, "no more"),
    (f"{IPAM}.RequestAddress", says({"Address": "fd00::5/64"}), Invalid, "is not in"),
    (f"{IPAM}.RequestAddress", says({"Address": ["10.7.0.5/24"]}), Invalid, "RequestAddress"),
    (f"{IPAM}.RequestAddress", says({"Address": "10.7.0.255/24"}), Conflict, "no endpoint's"),
    (f"{IPAM}.RequestAddress", says({"Address": "10.7.0.1/24"}), Conflict, "no endpoint's"),
    (f"{IPAM}.RequestAddress", hangs, Timeout, "has not answered"),
    (f"{IPAM}.RequestAddress", dies, Unavailable, "does not answer"),
    (f"{NET}.CreateEndpoint", says({"Err": "no"}), Refused, "no"),
    (f"{NET}.CreateEndpoint", says("no", 404), VxmeshError, "no"),
    (f"{NET}.CreateEndpoint", hangs, Timeout, "has not answered"),
    (f"{NET}.CreateEndpoint", dies, Unavailable, "does not answer"),
    (f"{NET}.CreateEndpoint", does_and_dies, Unavailable, "does not answer"),
    (f"{NET}.CreateEndpoint", does_and_says(Interface={"Address": "10.7.0.9/24"}),
     Invalid, "but was given"),
    (f"{NET}.CreateEndpoint", does_and_says(Interface={"MacAddress": "ff:ff:ff:ff:ff:ff"}),
     Invalid, "no station's address"),
    (f"{NET}.CreateEndpoint", does_and_says(Interface=[]), Invalid, "answered CreateEndpoint"),
    (f"{NET}.Join", says({"Err": "no"}), Refused, "no"),
    (f"{NET}.Join", hangs, Timeout, "has not answered"),
    (f"{NET}.Join", does_and_dies, Unavailable, "does not answer"),
    (f"{NET}.Join", does_and_says(InterfaceName={"SrcName": "../x"}), Invalid, "none can be"),
    (f"{NET}.Join", does_and_says(Gateway="fd00::1"), Invalid, "wrong family"),
    (f"{NET}.Join", does_and_says(StaticRoutes=[{}]), Invalid, "no subnet"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "wrong", "error", "text"), CONNECTS)
async def test_an_endpoint_is_made_whole_or_not_at_all(
    world: Rig, method: str, wrong: Wrong, error: type[VxmeshError], text: str
) -> None:
    net = await _network(world)
    before = sorted(map(str, world.odd.left()))
    world.odd.wrong[method] = wrong
    with pytest.raises(error, match=text):
        await _connect(world)
    world.odd.wrong.clear()
    assert not world.node.sandboxes[BOX].endpoints
    assert not world.node.members[net.id].all
    await world.until(lambda: sorted(map(str, world.odd.left())) == before)
    await _connect(world)
    await world.operations.remove_endpoints(["box"])
    await world.operations.remove_networks(["net"])
    await world.nothing_left()


UNDOS = ["Leave", "DeleteEndpoint", "DeleteNetwork", "ReleaseAddress", "ReleasePool"]


@pytest.mark.parametrize("verb", UNDOS)
@pytest.mark.parametrize("wrong", [hangs, dies, does_and_dies, says({"Err": "no", "Error": "no"})])
async def test_what_a_plugin_does_not_undo_is_asked_for_until_it_answers(
    world: Rig, verb: str, wrong: Wrong
) -> None:
    await _network(world)
    await _connect(world)
    method = f"{IPAM if verb.startswith('Release') else NET}.{verb}"
    world.odd.wrong[method] = wrong
    await world.operations.remove_endpoints(["box"])
    await world.operations.remove_networks(["net"])
    await world.until(lambda: method in world.odd.methods())
    world.odd.wrong.clear()
    await world.until(lambda: not world.undoer.ledger.steps)
    if wrong in (hangs, dies):
        await world.nothing_left()  # what it refuses is let go, and what it did stays done
    assert not world.interfaces.inside
    assert not world.interfaces.shown


async def test_who_has_something_removed_waits_until_it_is_undone(world: Rig) -> None:
    await _network(world)
    await _connect(world)
    world.odd.wrong[f"{NET}.Leave"] = slowly
    await world.operations.remove_endpoints(["box"])
    await world.until(lambda: f"{NET}.Leave" in world.odd.methods())  # by what goes on by itself
    await world.operations.remove_networks(["net"])
    assert not world.odd.left()


async def test_an_agent_that_is_killed_undoes_in_its_next_life(world: Rig) -> None:
    await _network(world)
    await _connect(world)
    await world.end()
    await world.odd.stop()
    world.begin()
    await world.operations.remove_endpoints(["box"])
    await world.operations.remove_networks(["net"])
    assert json.loads((world.directory / "plugins.json").read_bytes()), "the plugin is away"
    await world.odd.start()
    await world.nothing_left()
    undone = [m.partition(".")[2] for m in world.odd.methods() if m.partition(".")[2] in UNDOS]
    assert undone == [
        "Leave", "DeleteEndpoint", "ReleaseAddress", "DeleteNetwork", "ReleaseAddress",
        "ReleasePool",
    ]  # fmt: skip


async def test_who_goes_away_while_a_plugin_works_leaves_nothing(world: Rig) -> None:
    await _network(world)
    before = sorted(map(str, world.odd.left()))
    for method in (f"{IPAM}.RequestAddress", f"{NET}.CreateEndpoint", f"{NET}.Join"):
        world.odd.wrong = {method: hangs}
        world.odd.asked.clear()
        connecting = asyncio.create_task(_connect(world))
        asked = functools.partial(world.odd.methods, method)
        await world.until(asked)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        world.odd.wrong.clear()
        await world.until(lambda: sorted(map(str, world.odd.left())) == before)


# -- what is asked, and what becomes of it --


async def test_both_families_with_what_a_plugin_chooses(world: Rig) -> None:
    net = await _network(world, "overlay", ipv6=True)
    assert net.subnets == ("10.7.0.0/24", "fd07::/64")
    assert net.gateways == ("10.7.0.1", "fd07::1")
    assert net.ipam and net.ipam.pools == ("pool-10.7.0.0/24", "pool-fd07::/64")
    assert world.odd.last(f"{IPAM}.RequestPool") == {
        "AddressSpace": "all", "Pool": "", "SubPool": "", "Options": {}, "V6": True,
    }  # fmt: skip
    made = await world.operations.create_endpoint("net", parse_endpoint("one"))
    assert [format_address(a) for a in made.addresses] == ["10.7.0.2", "fd07::2"]


async def test_what_is_asked_for_is_passed_on(world: Rig) -> None:
    net = await _network(
        world,
        "bridge",
        subnets=["10.8.0.0/16"],
        gateways=["10.8.9.9"],
        ip_ranges=["10.8.1.0/24"],
        options={"aux.db": "10.8.1.7"},
        ipam_options={"pool": "blue"},
    )
    asked = [body for method, body in world.odd.asked if method == f"{IPAM}.RequestPool"]
    assert asked == [
        {"AddressSpace": "here", "Pool": "10.8.0.0/16", "SubPool": "10.8.1.0/24",
         "Options": {"pool": "blue"}, "V6": False},
    ]  # fmt: skip
    assert (net.gateways, net.ip_range) == (("10.8.9.9",), "10.8.1.0/24")
    assert world.odd.addresses == {"10.8.9.9", "10.8.1.7"}
    made = await world.operations.create_endpoint(
        "net", parse_endpoint("one", addresses=["10.8.1.8"])
    )
    assert made.addresses == (b"\x0a\x08\x01\x08",)
    with pytest.raises(Conflict, match="kept free by an option"):
        await world.operations.create_endpoint("net", parse_endpoint("two", addresses=["10.8.1.7"]))
    with pytest.raises(Conflict, match="is taken by one"):
        await world.operations.create_endpoint("net", parse_endpoint("two", addresses=["10.8.1.8"]))
    assert "10.8.1.8" in world.odd.addresses, "what one has was not given back for two"
    with pytest.raises(Invalid, match="is in no subnet"):
        await world.operations.create_endpoint("net", parse_endpoint("two", addresses=["10.9.0.1"]))
    await world.operations.remove_endpoints(["one"])
    await world.operations.create_endpoint("net", parse_endpoint("two", addresses=["10.8.1.8"]))


async def test_an_address_that_somebody_has_is_not_given_back_when_a_plugin_lies(
    world: Rig,
) -> None:
    await _network(world, "overlay")
    await world.operations.create_endpoint("net", parse_endpoint("one"))
    world.odd.wrong[f"{IPAM}.RequestAddress"] = says({"Address": "10.7.0.2/24"})
    with pytest.raises(Conflict, match=r"gave 10.7.0.2, which is somebody's"):
        await world.operations.create_endpoint("net", parse_endpoint("two"))
    with pytest.raises(Invalid, match=r"gave 10.7.0.3, asked for 10.7.0.9"):
        world.odd.wrong[f"{IPAM}.RequestAddress"] = says({"Address": "10.7.0.3/24"})
        spec = parse_endpoint("two", addresses=["10.7.0.9"])
        await world.operations.create_endpoint("net", spec)
    assert "10.7.0.2" in world.odd.addresses


async def test_a_plugin_that_wants_macs_is_told_them(world: Rig) -> None:
    world.odd.needs = {"requiresMacAddress": True, "More": 1}  # in whichever case, as in Docker
    await _network(world)
    await _connect(world)
    given = world.odd.last(f"{IPAM}.RequestAddress")["Options"][MAC]
    assert world.odd.last(f"{NET}.CreateEndpoint")["Interface"]["MacAddress"] == given
    await world.operations.create_endpoint("net", parse_endpoint("mine", mac="02:00:00:00:00:09"))
    assert world.odd.last(f"{IPAM}.RequestAddress")["Options"] == {MAC: "02:00:00:00:00:09"}


async def test_a_plugin_that_remembers_nothing_is_told_anew(world: Rig) -> None:
    world.odd.needs = {"RequiresRequestReplay": True}
    await _network(world, "overlay")
    await world.operations.create_endpoint("net", parse_endpoint("one"))
    had = set(world.odd.left())
    await world.end()
    world.odd.forget()
    world.begin()
    world.ipam.start()
    await world.until(lambda: set(world.odd.left()) == had)
    made = await world.operations.create_endpoint("net", parse_endpoint("two"))
    assert format_address(made.addresses[0]) == "10.7.0.3"
    await world.operations.remove_endpoints(["one", "two"])
    await world.operations.remove_networks(["net"])
    await world.nothing_left()


async def test_a_subnet_that_is_taken_here_is_held_until_another_is_found(world: Rig) -> None:
    world.node.create_network(parse_network("there", subnets=["10.5.0.0/16"]))
    offers = iter(["10.5.1.0/24", "10.5.2.0/24", "10.6.0.0/24"])

    async def next_one(odd: object, method: str, body: dict[str, object]) -> object:
        world.odd.wrong.pop(method)
        answer = world.odd.do(method, {**body, "Pool": next(offers)})
        world.odd.wrong[method] = next_one  # type: ignore[assignment]
        return await says(answer)(world.odd, method, body)

    world.odd.wrong[f"{IPAM}.RequestPool"] = next_one  # type: ignore[assignment]
    net = await _network(world, "overlay")
    assert net.subnets == ("10.6.0.0/24",)
    assert list(world.odd.pools.values()) == ["10.6.0.0/24"], "the others are given back"


async def test_a_pool_that_another_network_has_is_not_given_back(world: Rig) -> None:
    await _network(world, "overlay")
    with pytest.raises(Conflict, match=r"offers 10.7.0.0/24, which overlaps 10.7.0.0/24, network"):
        await world.operations.create_network(parse_network("more", ipam_driver="remote:odd"))
    names = ("a", "b", "c")
    made = await asyncio.gather(
        *(
            world.operations.create_network(
                parse_network(name, subnets=["10.8.0.0/24"], ipam_driver="remote:odd")
            )
            for name in names
        ),
        return_exceptions=True,
    )
    assert sorted(type(m).__name__ for m in made) == ["Conflict", "Conflict", "Network"]
    assert list(world.odd.pools.values()) == ["10.7.0.0/24", "10.8.0.0/24"]
    await world.operations.remove_networks([m.name for m in made if isinstance(m, Network)])
    assert list(world.odd.pools.values()) == ["10.7.0.0/24"]
    assert len(world.undoer.ledger.steps) == 1


@pytest.mark.parametrize(
    ("data", "gateways", "expected"),
    [
        ({"com.docker.network.gateway": "10.7.0.254/24"}, [], "10.7.0.254"),
        ({"COM.docker.network.gateway": "10.7.0.254"}, [], "10.7.0.254"),
        ({}, [], "10.7.0.1"),
        ({"other": 5}, [], "10.7.0.1"),
        (None, [], "10.7.0.1"),
    ],
)
async def test_the_gateway_is_a_plugins_choice(
    world: Rig, data: object, gateways: list[str], expected: str
) -> None:
    world.odd.wrong[f"{IPAM}.RequestPool"] = does_and_says(Data=data)
    net = await _network(world, "overlay", gateways=gateways)
    assert net.gateways == (expected,)


async def test_a_plugin_that_chooses_no_gateway_is_asked_for_the_first_address(
    world: Rig,
) -> None:
    async def none(odd: object, method: str, body: dict[str, str]) -> object:
        if body["Address"]:
            world.odd.wrong.pop(method)
            return await says(world.odd.do(method, body))(world.odd, method, body)
        return await says({"Address": "0.0.0.0/0"})(world.odd, method, body)

    world.odd.wrong[f"{IPAM}.RequestAddress"] = none  # type: ignore[assignment]
    net = await _network(world, "overlay")
    assert net.gateways == ("10.7.0.1",)
    assert world.odd.addresses == {"10.7.0.1"}


async def test_the_first_of_two_subnets_that_is_full_is_passed_over(world: Rig) -> None:
    await _network(world, "overlay", subnets=["10.8.0.0/30", "10.9.0.0/24"])

    async def full(odd: object, method: str, body: dict[str, str]) -> object:
        if "10.8" in body["PoolID"] and len(world.odd.addresses) > 2:
            return await says({"Error": "no available addresses"})(world.odd, method, body)
        return await says(world.odd.do(method, body))(world.odd, method, body)

    world.odd.wrong[f"{IPAM}.RequestAddress"] = full  # type: ignore[assignment]
    made = [
        await world.operations.create_endpoint("net", parse_endpoint(name)) for name in ("a", "b")
    ]
    assert [format_address(e.addresses[0]) for e in made] == ["10.8.0.2", "10.9.0.2"]


async def test_a_services_address_is_a_plugins_too(world: Rig) -> None:
    await _network(world, "overlay")
    spec = parse_service("web", "net", ports=[Port(80, 80)])
    made = await world.services.create(spec)
    assert [format_address(v) for v in made.vips] == ["10.7.0.2"]
    assert "10.7.0.2" in world.odd.addresses
    await world.services.remove(["web"])
    await world.until(lambda: "10.7.0.2" not in world.odd.addresses)


async def test_what_does_not_ask_a_plugin_is_refused(world: Rig) -> None:
    net = await _network(world, "overlay")

    async def lines() -> AsyncIterator[bytes]:
        yield b'{"name": "a", "mac": "02:00:00:00:00:01", "addresses": ["10.7.0.9"]}\n'

    with pytest.raises(Unsupported, match="gives out"):
        await world.operations.announce("net", lines())
    with pytest.raises(Unsupported, match="gives out"):
        world.operations.check_handed_out(net)
    with pytest.raises(Unsupported, match="to choose"):
        await world.operations.hold_address("net", 4)


@pytest.mark.parametrize(
    ("driver", "options", "text"),
    [
        ("odd", {}, "names no plugin"),
        ("remote:", {}, "names no plugin"),
        ("remote:../x", {}, "names no plugin"),
        ("", {"a": "b"}, "is for a plugin"),
        ("default", {"a": "b"}, "is for a plugin"),
    ],
)
def test_an_ipam_driver_is_a_plugin(driver: str, options: dict[str, str], text: str) -> None:
    with pytest.raises(Invalid, match=text):
        parse_network("net", ipam_driver=driver, ipam_options=options)


async def test_a_plugin_of_the_other_kind_is_told_from_one_that_is_not_there(world: Rig) -> None:
    world.odd.implements = ["NetworkDriver"]
    with pytest.raises(Invalid, match="implements NetworkDriver and not IpamDriver"):
        await _network(world)
    await world.odd.stop()
    with pytest.raises(NotFound, match="plugin odd"):
        await _network(world)


# -- two at once --


async def test_of_two_connects_to_one_network_at_once_one_is_taken_back(world: Rig) -> None:
    await _network(world)
    async with asyncio.timeout(20):
        done = await asyncio.gather(_connect(world), _connect(world), return_exceptions=True)
    assert sorted(type(d).__name__ for d in done) == ["Conflict", "NoneType"]
    [endpoint] = world.node.sandboxes[BOX].endpoints
    await world.until(lambda: len(world.odd.joined) == 1)
    assert len(world.interfaces.inside) == 1
    assert world.odd.endpoints == {(endpoint * 4)[:64]}
