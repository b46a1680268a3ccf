"""Interfaces on a wire of the host's, on a kernel that is a stand-in: VLANs and ipvlan, which
the kernels of tests may lack, and what is left when they are used no more."""

from __future__ import annotations

import dataclasses
import errno
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.datapath import sandbox
from agent.datapath.backlog import Failures, Key, Passing
from agent.datapath.lanapplier import LanApplier
from agent.datapath.lans import VLAN_MARK, Lans
from agent.datapath.netlink import Link, Netlink
from agent.datapath.repairs import Repairs
from agent.drivers.base import DesiredState, HostSide, Lan, Port
from agent.errors import Conflict, NotFound, Unsupported

PLAIN = Link(
    index=1, name="", kind="", alias="", mac="02:00:00:00:00:01", mtu=1500, up=True, carrier=True,
    master=0, group=0, peer=0, vni=0, local="", data_port=0, learning=False, proxy=False,
    port_learning=False, port_flood=False, port_groups=True, port_forwards=False,
)  # fmt: skip
LAN = Lan("1" * 16, "lan", 7, "macvlan", "bridge", "eth1.20", "eth1", 20, 0)
NETNS = "/proc/self/ns/net"


class Killed(BaseException):
    """The agent was, there."""


class Kernel:
    """The devices of a host, and of the one sandbox there is."""

    def __init__(self, *names: str, lacks: Collection[str] = ()) -> None:
        self.devices: dict[str, Link] = {}
        self.lacks = lacks
        self.dies_at_once = False  # the agent, once there is a VLAN
        self.inside: list[tuple[Any, ...]] = []
        self.gone: list[str] = []
        self.calls_left = 0  # of set_link, until the agent is killed
        for name in names:
            self._put(name)

    def _put(self, name: str, **more: Any) -> None:
        index = len(self.devices) + len(self.gone) + 2
        self.devices[name] = dataclasses.replace(PLAIN, name=name, index=index, **more)

    async def link(self, name: str) -> Link | None:
        return self.devices.get(name)

    async def links(self) -> list[Link]:
        return list(self.devices.values())

    async def index(self, name: str) -> int:
        return self.devices[name].index

    async def add_vlan(self, name: str, trunk: int, vlan: int) -> None:
        if "vlan" in self.lacks:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        if any((d.kind, d.peer) == ("vlan", trunk) for d in self.devices.values()):
            raise FileExistsError  # it knows of one VLAN only
        self._put(name, kind="vlan", peer=trunk, up=False)
        if self.dies_at_once:
            raise Killed

    async def add_sharing(
        self, kind: str, mode: str, name: str, parent: int, netns: int, mtu: int, mac: str = ""
    ) -> None:
        if kind in self.lacks:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        self.inside.append((kind, mode, name, parent, mtu, mac))

    async def set_link(self, index: int, /, **what: Any) -> None:
        [name] = [n for n, link in self.devices.items() if link.index == index]
        changed = {"up": what.pop("state") == "up"} if "state" in what else {}
        changed |= {"name": what.pop("ifname")} if "ifname" in what else {}
        changed |= {"alias": what.pop("ifalias")} if "ifalias" in what else {}
        link = dataclasses.replace(self.devices.pop(name), **changed, **what)
        self.devices[link.name] = link
        self.calls_left -= 1
        if not self.calls_left:
            raise Killed

    async def delete_link(self, index: int) -> None:
        [name] = [n for n, link in self.devices.items() if link.index == index]
        del self.devices[name]
        self.gone.append(name)

    async def addresses(self, index: int) -> set[str]:
        return set()


class Furnished:
    """The sandbox's side: an interface is there once it was made."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.is_taken = False  # its MAC, on the parent

    async def __call__(self, fd: int, port: Port, mtu: int, peer: int, old: Port | None) -> int:
        if self.is_taken:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        if not any(made[2] == port.ifname for made in self._kernel.inside):
            raise LookupError(port.ifname)
        return 0


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is done in the stand-in's sandbox, which is this process's own namespace: nothing."""
    done: Counter[str] = Counter()

    def stand_in(name: str) -> Callable[..., Coroutine[None, None, int]]:
        async def call(*_: object) -> int:
            done[name] += 1
            return 0

        return call

    for name in (
        *("sandbox.mark", "sandbox.remove"),
        *("nameway.furnish", "nameway.audit", "nameway.clear"),
    ):
        monkeypatch.setattr(f"agent.datapath.{name}", stand_in(name))
    return done


def _lans(kernel: Kernel) -> Lans:
    return Lans(cast(Netlink, kernel), NETNS, Furnished(kernel))


def _port(kind: str, mac: bytes = b"") -> Port:
    inode = Path(NETNS).stat().st_ino
    return Port("a" * 16, "", mac, ("10.0.0.2/24",), NETNS, inode, "eth0", (), kind=kind)


async def test_a_vlan_is_made_on_demand_shared_and_removed_when_unused() -> None:
    kernel = Kernel("eth1")
    lans = _lans(kernel)
    other = dataclasses.replace(LAN, network="2" * 16, vni=8)
    await lans.ensure(LAN)
    made = kernel.devices["eth1.20"]
    assert (made.kind, made.peer, made.up) == ("vlan", kernel.devices["eth1"].index, True)
    await lans.ensure(other)
    assert kernel.devices["eth1.20"] == made, "one for both"
    await lans.remove(LAN.vni)
    await lans.sweep([other])
    assert "eth1.20" in kernel.devices
    await lans.remove(other.vni)
    await lans.sweep([])
    assert kernel.gone == ["eth1.20"]


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
async def test_a_vlan_that_was_made_half_is_nobodys_for_ever(calls: int) -> None:
    """The agent is killed after that many steps with a new sub-interface."""
    for swept in (True, False):
        kernel = Kernel("eth1")
        kernel.dies_at_once, kernel.calls_left = calls == 0, calls
        with pytest.raises(Killed):
            await _lans(kernel).ensure(LAN)
        kernel.dies_at_once = False
        lans = _lans(kernel)
        if swept:
            await lans.sweep([])
            assert list(kernel.devices) == ["eth1"], "no network wants it any more"
        await lans.ensure(LAN)
        made = kernel.devices["eth1.20"]
        assert set(kernel.devices) == {"eth1", "eth1.20"} and made.up and made.alias == VLAN_MARK


async def test_a_vlan_under_another_name_is_said() -> None:
    kernel = Kernel("eth1")
    await kernel.add_vlan("mine", kernel.devices["eth1"].index, 20)
    with pytest.raises(Conflict, match=r"VLAN 20 of device eth1: has a sub-interface of another"):
        await _lans(kernel).ensure(LAN)
    assert set(kernel.devices) == {"eth1", "mine"}


async def test_a_vlan_that_is_the_users_is_used_and_left() -> None:
    kernel = Kernel("eth1", "eth1.20")
    lans = _lans(kernel)
    await lans.ensure(LAN)
    await lans.remove(LAN.vni)
    await lans.sweep([])
    assert set(kernel.devices) == {"eth1", "eth1.20"}


async def test_a_vlan_that_was_deleted_or_set_down_is_put_right() -> None:
    kernel = Kernel("eth1")
    lans = _lans(kernel)
    await lans.ensure(LAN)
    await kernel.set_link(kernel.devices["eth1.20"].index, state="down")
    lans.fixed.clear()
    await lans.ensure(LAN)
    assert kernel.devices["eth1.20"].up and lans.fixed["link"] == 1
    await kernel.delete_link(kernel.devices["eth1.20"].index)
    await lans.ensure(LAN)
    assert lans.held[7].index == kernel.devices["eth1.20"].index


async def test_what_this_host_lacks_is_said() -> None:
    with pytest.raises(Unsupported, match=r"kernel has no VLANs .8021q.\. Try 'modprobe 8021q'"):
        await _lans(Kernel("eth1", lacks={"vlan"})).ensure(LAN)
    with pytest.raises(NotFound, match=r"parent eth1\.20 of network lan: is not on this host"):
        await _lans(Kernel("eth0")).ensure(LAN)
    lans = _lans(Kernel("eth1", lacks={"ipvlan"}))
    await lans.ensure(dataclasses.replace(LAN, kind="ipvlan", mode="l2", parent="eth1", vlan=0))
    with pytest.raises(Unsupported, match="of driver ipvlan, which this host's kernel has not"):
        await lans.attach(7, _port("ipvlan"))
    assert not lans.held[7].ports


async def test_more_than_the_parents_mtu_is_refused() -> None:
    with pytest.raises(Conflict, match=r"MTU 9000 of network lan: is more than eth1\.20 .* 1500"):
        await _lans(Kernel("eth1.20")).ensure(dataclasses.replace(LAN, mtu=9000))


@pytest.mark.parametrize("mode", ["l2", "l3"])
async def test_an_ipvlan_interface_is_made_in_its_mode_without_a_mac(mode: str) -> None:
    kernel = Kernel("eth1")
    lans = _lans(kernel)
    await lans.ensure(dataclasses.replace(LAN, kind="ipvlan", mode=mode, parent="eth1", vlan=0))
    await lans.attach(7, _port("ipvlan"))
    parent = kernel.devices["eth1"].index
    assert kernel.inside == [("ipvlan", mode, "eth0", parent, 1500, "")]
    await lans.attach(7, _port("ipvlan"))
    assert len(kernel.inside) == 1, "it is there"


async def test_a_mac_that_is_not_free_yet_is_said_at_once_and_leaves_nothing(
    inside: Counter[str],
) -> None:
    kernel = Kernel("eth1")
    furnished = Furnished(kernel)
    lans = Lans(cast(Netlink, kernel), NETNS, furnished)
    await lans.ensure(dataclasses.replace(LAN, parent="eth1", vlan=0))
    kernel.inside.append(("macvlan", "bridge", "eth0"))
    furnished.is_taken = True
    with pytest.raises(Passing, match=r"MAC 02:.*: is that of another interface on eth1\. Give"):
        await lans.attach(7, _port("macvlan", b"\x02\0\0\0\0\x05"))
    assert not lans.held[7].ports
    furnished.is_taken = False
    await lans.attach(7, _port("macvlan", b"\x02\0\0\0\0\x05"))
    assert list(lans.held[7].ports) == ["a" * 16]


async def test_an_interface_that_could_not_be_deleted_is_known_on(
    monkeypatch: pytest.MonkeyPatch, inside: Counter[str]
) -> None:
    lans = _lans(Kernel("eth1"))
    lan = dataclasses.replace(LAN, parent="eth1", vlan=0)
    await lans.ensure(lan)
    await lans.attach(7, _port("macvlan"))
    delete = sandbox.remove

    async def refuse(port: Port, peer: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("agent.datapath.sandbox.remove", refuse)
    with pytest.raises(OSError, match="Too many"):
        await lans.prune(7, ())
    with pytest.raises(OSError, match="Too many"):
        await lans.remove(7)
    assert list(lans.held[7].ports) == ["a" * 16]
    monkeypatch.setattr("agent.datapath.sandbox.remove", delete)
    before = inside["sandbox.remove"]
    await lans.remove(7)
    assert not lans.held and not lans.asked
    assert inside["sandbox.remove"] == before + 1 and inside["nameway.clear"] == 1


async def test_a_failure_to_furnish_does_not_forget_what_is_there() -> None:
    kernel = Kernel("eth1")
    furnished = Furnished(kernel)
    lans = Lans(cast(Netlink, kernel), NETNS, furnished)
    await lans.ensure(dataclasses.replace(LAN, parent="eth1", vlan=0))
    port = _port("macvlan", b"\x02\0\0\0\0\x05")
    await lans.attach(7, port)
    furnished.is_taken = True
    with pytest.raises(Passing):
        await lans.attach(7, dataclasses.replace(port, gateways=("10.0.0.1",)))
    assert lans.held[7].ports == {port.endpoint: port}


async def test_what_a_network_that_cannot_be_made_has_in_sandboxes_is_taken_away(
    inside: Counter[str],
) -> None:
    lans = _lans(Kernel("eth0"))
    port = _port("macvlan")
    lan = dataclasses.replace(LAN, parent="eth1", vlan=0, ports={port.endpoint: port})
    desired = SimpleNamespace(lan=lambda vni: lan, lans=lambda: {7: lan})
    failures = Failures(lambda key: None)
    applier = LanApplier(cast(DesiredState, desired), lans, failures, Repairs(), _attempt)
    with pytest.raises(NotFound):
        await applier.apply(7)
    before = inside.copy()
    assert not lans.held and before["sandbox.remove"] == 0
    lan = dataclasses.replace(lan, ports={})
    with pytest.raises(NotFound):
        await applier.apply(7)
    assert inside["sandbox.remove"] == 1 and not lans.asked


async def _attempt(key: Key, work: Coroutine[Any, Any, None], whole: bool = True) -> None:
    await work


async def test_a_device_of_somebody_elses_is_never_the_hosts_interface() -> None:
    kernel = Kernel("eth1", "vxhaaaaaaaaaaaa")
    await kernel.set_link(kernel.devices["vxhaaaaaaaaaaaa"].index, ifalias="mine")
    side = HostSide("a" * 16, "vxhaaaaaaaaaaaa", b"", ("10.0.0.9",))
    with pytest.raises(Conflict, match="device vxhaaaaaaaaaaaa: is there and is not ours"):
        await _lans(kernel).ensure(dataclasses.replace(LAN, parent="eth1", host_side=side))


async def test_a_network_that_is_renumbered_is_left_as_it_is() -> None:
    kernel = Kernel("eth1")
    lans = _lans(kernel)
    await lans.ensure(LAN)
    lans.renumber(7, 9)
    await lans.ensure(dataclasses.replace(LAN, vni=9))
    assert list(lans.held) == [9] and not kernel.gone
