"""Operations against a kernel and a cluster that are stand-ins: what a caller may rely on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import msgspec
import pytest

from agent.core.addresses import Range
from agent.core.replica import Delta, Record
from agent.errors import Conflict, InUse, NotFound
from agent.lanmodel import HOST_SIDE
from agent.model import HANDED_OUT, Endpoint, Network, Node, Publish, Sandbox, encode
from agent.node import NodeState
from agent.operations import Operations
from agent.plan import Plan
from agent.requests import EndpointSpec, parse_endpoint, parse_network


class SlowKernel:
    """Settles when it is let."""

    def __init__(self) -> None:
        self.settled = asyncio.Event()

    async def settle(self, endpoint: str | None = None) -> None:
        await self.settled.wait()


class Alone:
    """A cluster of one."""

    async def wait_applied(
        self, version: int, seconds: float, networks: Sequence[str] = ()
    ) -> dict[str, str]:
        return {}

    async def request_space(
        self, owner: str, network: Network, family: int, ranges: list[Range]
    ) -> str:
        raise AssertionError("nobody to ask")


async def _durable() -> None:
    pass


BOX, OTHER = "b" * 16, "c" * 16
ME = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)


def make() -> tuple[NodeState, Operations]:
    """A node with networks web, of IPv4, and db, and a sandbox in none."""
    node = NodeState(ME, lambda: 1000.0, random.Random(1))
    node.describe(ME)
    kernel = SlowKernel()
    kernel.settled.set()
    node.create_network(parse_network("web", subnets=["10.1.0.0/24"]))
    node.create_network(parse_network("db", subnets=["10.2.0.0/24"]))
    node.put_sandbox(Sandbox(BOX, "box", "/proc/1/ns/net", 1, 1, 1, 0.0))
    return node, Operations(node, Alone(), kernel, _durable)


async def test_a_sandbox_that_has_just_ended_is_out_of_the_kernel_when_its_rm_returns() -> None:
    # `vxmesh run` asks for it after its command ended; the watcher may have been quicker, and
    # the bridge was then still there when `run` returned.
    me = Node("a" * 16, "n1", "10.99.0.1", 7946, "10.99.0.1", 4789, "0", 0.0, 1500)
    node = NodeState(me, lambda: 1000.0, random.Random(1))
    node.describe(me)
    kernel = SlowKernel()
    operations = Operations(node, Alone(), kernel, _durable)
    node.put_sandbox(Sandbox("b" * 16, "sb", "/proc/1/ns/net", 1, 1, 1, 0.0))
    operations.drop_sandbox("b" * 16)
    removing = asyncio.create_task(operations.remove_sandboxes(["b" * 16]))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not removing.done()
    kernel.settled.set()
    with pytest.raises(NotFound):
        await removing


async def test_a_sandbox_is_connected_and_disconnected_by_order() -> None:
    node, operations = make()
    web = await operations.create_endpoint("web", parse_endpoint("box"), sandbox="box")
    db = await operations.create_endpoint("db", parse_endpoint("box", priority=1), sandbox=BOX)
    box = node.sandboxes[BOX]
    assert (box.endpoints, box.ifnames, box.default) == ((web.id, db.id), ("eth0", "eth1"), db.id)
    await operations.remove_endpoints([db.id])
    assert node.sandboxes[BOX].default == web.id
    await operations.remove_endpoints([web.id])
    assert node.sandboxes[BOX].endpoints == (), "and its workload lives"
    again = await operations.create_endpoint("db", parse_endpoint("box"), sandbox="box")
    assert (node.sandboxes[BOX].ifnames, node.sandboxes[BOX].default) == (("eth0",), again.id)


async def test_a_network_on_the_wire_does_not_take_published_ports_their_way() -> None:
    node, operations = make()
    lan = parse_network(
        "lan", driver="macvlan", subnets=["10.3.0.0/24"], options={"parent": "eth0"}
    )
    node.create_network(lan)
    box = msgspec.structs.replace(node.sandboxes[BOX], publishes=(Publish(8080, 80),))
    node.put_sandbox(box)
    first = await operations.create_endpoint("web", parse_endpoint("box"), sandbox=BOX)
    with pytest.raises(Conflict, match="has published ports, which would end if network lan"):
        await operations.create_endpoint("lan", parse_endpoint("box", priority=1), sandbox=BOX)
    assert node.sandboxes[BOX].endpoints == (first.id,)
    assert [m.name for m in node.members[first.network].local.values()] == ["box"]
    beside = await operations.create_endpoint("lan", parse_endpoint("box"), sandbox=BOX)
    assert node.sandboxes[BOX].endpoints == (first.id, beside.id)
    assert [f.address for f in Plan(node).forwards()] == ["10.1.0.2"]
    await operations.remove_endpoints([first.id, beside.id])
    await operations.create_endpoint("lan", parse_endpoint("box", priority=1), sandbox=BOX)
    assert node.sandboxes[BOX].default, "there was none to lose"


async def test_the_hosts_own_interface_does_not_outlive_a_workload_that_ends_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, operations = make()
    options = {"parent": "eth0", "host-interface": "true"}
    lan = parse_network("lan", driver="macvlan", subnets=["10.3.0.0/24"], options=options)
    lan_id = node.create_network(lan).id
    allocate, ends = operations.allocate, False

    async def slow(network: str, spec: EndpointSpec, sandbox: str) -> Endpoint:
        if sandbox == HOST_SIDE and ends:
            operations.drop_sandbox(BOX)  # while another node is asked for an address
        return await allocate(network, spec, sandbox)

    monkeypatch.setattr(operations, "allocate", slow)
    made = await operations.create_endpoint("lan", parse_endpoint("box"), sandbox=BOX)
    assert node.host_side(lan_id)
    await operations.remove_endpoints([made.id])
    assert node.host_side(lan_id) is None
    ends = True
    with pytest.raises(NotFound, match="has ended meanwhile"):
        await operations.create_endpoint("lan", parse_endpoint("box"), sandbox=BOX)
    assert node.host_side(lan_id) is None and not node.members[lan_id].local


async def test_a_container_of_dockers_is_connected_by_docker_alone() -> None:
    node, operations = make()
    held, _ = await operations.hand_out(node.find_network("web").id, parse_endpoint("docker-1"))
    name = node.sandboxes[held.sandbox].name
    with pytest.raises(InUse, match="Docker engine"):
        await operations.create_endpoint("db", parse_endpoint("x"), sandbox=name)
    with pytest.raises(InUse, match="docker network disconnect"):
        await operations.remove_endpoints([held.id], by_user=True)
    assert node.sandboxes[held.sandbox].netns == HANDED_OUT
    assert node.local_endpoint(held.id) == held
    await operations.remove_endpoints([held.id])
    assert held.sandbox not in node.sandboxes, "the engine may"


async def test_a_user_takes_no_interface_of_a_container_by_all_or_by_its_sandbox() -> None:
    node, operations = make()
    web = node.find_network("web")
    held, _ = await operations.hand_out(web.id, parse_endpoint("docker-1"))
    own = await operations.create_endpoint("web", parse_endpoint("box"), sandbox="box")
    there = dict(node.sandboxes)
    with pytest.raises(InUse, match="Docker engine"):
        await operations.remove_endpoints([], "web", every=True, by_user=True)
    with pytest.raises(InUse, match="Docker engine"):
        await operations.remove_sandboxes([BOX, held.sandbox], by_user=True)
    assert node.sandboxes == there and set(node.members[web.id].local) == {held.id, own.id}
    await operations.remove_sandboxes([BOX], by_user=True)
    assert set(node.members[web.id].local) == {held.id}
    # A node that leaves, for one, may.
    await operations.remove_sandboxes([held.sandbox])
    assert not node.members[web.id].local


async def test_networks_of_one_sandbox_do_not_overlap() -> None:
    node, operations = make()
    web = node.find_network("web")
    # Made elsewhere at the same time as `web`, which is older.
    twin = Network("f" * 16, "twin", "overlay", ("10.1.0.0/16",), ("10.1.0.1",), "", 77, 0, False,
                   False, {}, {}, 1.0, OTHER, web.stamp + 1, False, web.born + 1)  # fmt: skip
    node.merge(Delta(OTHER, 0, 1, [Record(f"w/{twin.id}", 1, encode(twin))]))
    assert node.find_network("twin").subnets == ("10.1.0.0/16",)
    await operations.create_endpoint("web", parse_endpoint("box"), sandbox="box")
    before = node.sandboxes[BOX]
    with pytest.raises(Conflict, match="overlaps that of network web"):
        await operations.create_endpoint("twin", parse_endpoint("box"), sandbox="box")
    assert node.sandboxes[BOX] == before
    with pytest.raises(Conflict, match="is in network web already"):
        await operations.create_endpoint("web", parse_endpoint("other"), sandbox="box")
    assert len(node.members[web.id].local) == 1


@pytest.mark.parametrize("when", ["while an address is asked for", "while it is made"])
async def test_a_sandbox_that_ends_while_it_is_connected_stays_ended(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, operations = make()

    async def allocate(network: str, spec: EndpointSpec, sandbox: str) -> Endpoint:
        if "asked" in when:
            operations.drop_sandbox(BOX)
        return node.create_endpoint(network, spec, sandbox)

    async def settle(endpoint: str | None = None) -> None:
        operations.drop_sandbox(BOX)

    monkeypatch.setattr(operations, "allocate", allocate)
    monkeypatch.setattr(operations._kernel, "settle", settle)
    with pytest.raises(NotFound, match="has ended meanwhile"):
        await operations.create_endpoint("web", parse_endpoint("box"), sandbox="box")
    assert not node.sandboxes and not node.members[node.find_network("web").id].local
