"""What is set on a WireGuard device, and both languages in which it is said.

The kernel that this runs on has no WireGuard: its messages are held against pyroute2's reading
of them, which was written by others from the same header.
"""

from __future__ import annotations

import base64
import errno
from collections.abc import Iterator
from typing import Any

import pytest
from pyroute2.netlink.generic.wireguard import wgmsg

from agent.datapath import wireguard_go, wireguard_netlink
from agent.datapath.packing import HEADER, NLMSG_DONE, NLMSG_ERROR
from agent.datapath.wgconfig import KEEPALIVE, Config, Peer, Update, difference
from agent.datapath.wireguard_netlink import WireguardKernel
from agent.drivers.base import WireguardDevice, WireguardPeer
from agent.errors import Conflict, VxmeshError

A, B, PRIVATE = bytes([1]) * 32, bytes([2]) * 32, bytes([9]) * 32
INNER_A, INNER_B = (bytes.fromhex("fd76786d7767" + "0" * 19 + n) for n in "12")
CIDR_A, CIDR_B = "fd76:786d:7767::1/128", "fd76:786d:7767::2/128"


def wanted(**peers: bool) -> WireguardDevice:
    """A device with peers a and b, as named, and whether a session is held with each."""
    known = {
        "a": WireguardPeer(A, ("192.0.2.1", 51850), INNER_A, peers.get("a", False)),
        "b": WireguardPeer(B, ("2001:db8::2", 51851), INNER_B, peers.get("b", False)),
    }
    found = {known[name].public_key: known[name] for name in peers}
    return WireguardDevice("vxw0", PRIVATE, 51850, INNER_A, 1440, found)


PEER_A = Peer(A, ("192.0.2.1", 51850), frozenset([CIDR_A]), KEEPALIVE)
PEER_B = Peer(B, ("2001:db8::2", 51851), frozenset([CIDR_B]), 0)
WHOLE = Config(PRIVATE, 51850, {A: PEER_A, B: PEER_B})


def test_an_empty_device_gets_everything() -> None:
    update = difference(Config(b"", 0, {}), wanted(a=True, b=False), {}, shrink=False)
    assert update == Update(PRIVATE, 51850, [PEER_A, PEER_B])


def test_what_is_right_is_left_alone() -> None:
    assert not difference(WHOLE, wanted(a=True, b=False), {}, shrink=True)


def test_a_peer_goes_only_when_that_is_asked_for() -> None:
    assert not difference(WHOLE, wanted(a=True), {}, shrink=False)
    assert difference(WHOLE, wanted(a=True), {}, shrink=True) == Update(gone=[B])


def test_a_peer_with_other_addresses_is_put_right_without_moving_it() -> None:
    wide = Peer(A, ("198.51.100.7", 9), frozenset([CIDR_A, "::/0"]), KEEPALIVE)
    have = Config(PRIVATE, 51850, {A: wide})
    update = difference(have, wanted(a=True), {A: ("192.0.2.1", 51850)}, shrink=True)
    assert update.peers == [Peer(A, None, frozenset([CIDR_A]), KEEPALIVE)]


def test_a_peer_that_roamed_is_followed_until_it_says_another_place_itself() -> None:
    roamed = Peer(A, ("198.51.100.7", 9), frozenset([CIDR_A]), KEEPALIVE)
    have = Config(PRIVATE, 51850, {A: roamed})
    assert not difference(have, wanted(a=True), {A: ("192.0.2.1", 51850)}, shrink=True)
    update = difference(have, wanted(a=True), {A: ("192.0.2.99", 51850)}, shrink=True)
    assert update.peers == [PEER_A]


# -- wireguard-go --


def test_what_wireguard_go_is_told() -> None:
    update = Update(PRIVATE, 51850, [PEER_A, Peer(B, PEER_B.endpoint, PEER_B.allowed, 0)], [B])
    assert wireguard_go.render(update).splitlines() == [
        "set=1",
        f"private_key={PRIVATE.hex()}",
        "listen_port=51850",
        f"public_key={B.hex()}",
        "remove=true",
        f"public_key={A.hex()}",
        "endpoint=192.0.2.1:51850",
        "replace_allowed_ips=true",
        f"allowed_ip={CIDR_A}",
        "persistent_keepalive_interval=25",
        f"public_key={B.hex()}",
        "endpoint=[2001:db8::2]:51851",
        "replace_allowed_ips=true",
        f"allowed_ip={CIDR_B}",
        "persistent_keepalive_interval=0",
        "",
    ]


def test_what_wireguard_go_tells() -> None:
    answer = "\n".join(
        [
            f"private_key={PRIVATE.hex()}",
            "listen_port=51850",
            f"public_key={A.hex()}",
            f"preshared_key={'0' * 64}",
            "protocol_version=1",
            "endpoint=192.0.2.1:51850",
            "last_handshake_time_sec=100",
            "last_handshake_time_nsec=500000000",
            "tx_bytes=1",
            "rx_bytes=2",
            "persistent_keepalive_interval=25",
            f"allowed_ip={CIDR_A}",
            f"public_key={B.hex()}",
            "endpoint=[2001:db8::2]:51851",
            f"allowed_ip={CIDR_B}",
            "errno=0",
            "",
            "",
        ]
    )
    config = wireguard_go.parse(answer)
    assert config.peers[A].handshake == 100.5 and config.peers[B].handshake == 0
    assert not difference(config, wanted(a=True, b=False), {}, shrink=True)


@pytest.mark.parametrize(
    "answer", ["", "errno=-5\n\n", "listen_port=x\nerrno=0\n\n", "public_key=zz\nerrno=0\n\n"]
)
def test_an_answer_that_is_none_is_an_error(answer: str) -> None:
    with pytest.raises(VxmeshError):
        wireguard_go.parse(answer)


# -- the kernel --


def plain(message: Any) -> dict[str, Any]:
    """A pyroute2 message's attributes by name, nested ones too."""
    found: dict[str, Any] = {}
    for name, value in message["attrs"]:
        if isinstance(value, list) and value and hasattr(value[0], "get_attr"):
            found[name] = [plain(part) for part in value]
        else:
            found[name] = value
    return found


def decoded(data: bytes) -> Any:
    message = wgmsg(data)
    message.decode()
    return message


def test_what_the_kernel_is_told_is_what_others_read() -> None:
    update = Update(PRIVATE, 51850, [PEER_A, PEER_B], [bytes([3]) * 32])
    (data,) = wireguard_netlink.pack_set(28, "vxw0", update)
    message = decoded(data)
    assert (message["cmd"], message["version"], message["header"]["type"]) == (1, 1, 28)
    assert message["header"]["length"] == len(data)
    found = plain(message)
    assert found["WGDEVICE_A_IFNAME"] == "vxw0" and found["WGDEVICE_A_LISTEN_PORT"] == 51850
    assert found["WGDEVICE_A_PRIVATE_KEY"] == base64.b64encode(PRIVATE)
    gone, a, b = found["WGDEVICE_A_PEERS"]
    assert gone["WGPEER_A_FLAGS"] == 1 and "WGPEER_A_ENDPOINT" not in gone
    assert a["WGPEER_A_PUBLIC_KEY"] == base64.b64encode(A)
    assert a["WGPEER_A_FLAGS"] == 2
    assert a["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL"] == 25
    ends = [(p["WGPEER_A_ENDPOINT"]["addr"], p["WGPEER_A_ENDPOINT"]["port"]) for p in (a, b)]
    assert ends == [("192.0.2.1", 51850), ("2001:db8::2", 51851)]
    (allowed,) = a["WGPEER_A_ALLOWEDIPS"]
    assert allowed["WGALLOWEDIP_A_FAMILY"] == 10 and allowed["WGALLOWEDIP_A_CIDR_MASK"] == 128
    assert bytes.fromhex(allowed["WGALLOWEDIP_A_IPADDR"].replace(":", "")) == INNER_A


def test_many_peers_are_many_messages_and_the_own_settings_are_in_the_first() -> None:
    peers = [
        Peer(i.to_bytes(32, "big"), ("192.0.2.1", 1), frozenset([CIDR_A]), 25) for i in range(250)
    ]
    sent = [
        decoded(data)
        for data in wireguard_netlink.pack_set(28, "vxw0", Update(PRIVATE, 51850, peers))
    ]
    assert [len(m.get_attr("WGDEVICE_A_PEERS")) for m in sent] == [100, 100, 50]
    assert [m.get_attr("WGDEVICE_A_LISTEN_PORT") for m in sent] == [51850, None, None]
    assert all(m["header"]["length"] < 1 << 16 for m in sent)


def answer(peers: list[dict[str, Any]], **own: Any) -> bytes:
    """The body of what the kernel would answer, packed by pyroute2."""
    message = wgmsg()
    message["attrs"] = [[f"WGDEVICE_A_{k}", v] for k, v in own.items()]
    if peers:
        packed = [{"attrs": [[f"WGPEER_A_{k}", v] for k, v in p.items()]} for p in peers]
        message["attrs"].append(["WGDEVICE_A_PEERS", packed])
    message.encode()
    return bytes(message.data[20:])


def allowed(address: bytes) -> list[dict[str, Any]]:
    attributes = {"FAMILY": 10, "IPADDR": address, "CIDR_MASK": 128}
    return [{"attrs": [[f"WGALLOWEDIP_A_{k}", v] for k, v in attributes.items()]}]


def test_what_the_kernel_tells_is_read_and_a_peer_goes_on_in_the_next_message() -> None:
    first = answer(
        [
            {
                "PUBLIC_KEY": base64.b64encode(A),
                "ENDPOINT": {"addr": "192.0.2.1", "port": 51850},
                "PERSISTENT_KEEPALIVE_INTERVAL": 25,
                "LAST_HANDSHAKE_TIME": {"tv_sec": 7, "tv_nsec": 250_000_000},
                "ALLOWEDIPS": allowed(INNER_A),
            }
        ],
        PRIVATE_KEY=base64.b64encode(PRIVATE),
        LISTEN_PORT=51850,
    )
    second = answer(
        [
            {"PUBLIC_KEY": base64.b64encode(A), "ALLOWEDIPS": allowed(INNER_B)},
            {
                "PUBLIC_KEY": base64.b64encode(B),
                "ENDPOINT": {"addr": "2001:db8::2", "port": 51851},
            },
        ]
    )
    config = wireguard_netlink.read([first, second])
    assert (config.private_key, config.port) == (PRIVATE, 51850)
    a, b = config.peers[A], config.peers[B]
    assert a == Peer(A, ("192.0.2.1", 51850), frozenset([CIDR_A, CIDR_B]), 25, 7.25)
    assert b == Peer(B, ("2001:db8::2", 51851))


class Socket:
    """A stand-in for the kernel: answers each request with what comes next in `answers`."""

    def __init__(self, answers: Iterator[list[bytes]]) -> None:
        self._answers, self._ready = answers, list[bytes]()
        self.sent: list[bytes] = []

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def bind(self, address: object) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        pass

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        self._ready = next(self._answers)

    def recv(self, size: int) -> bytes:
        return self._ready.pop(0)


def message(kind: int, body: bytes) -> bytes:
    return HEADER.pack(16 + len(body), kind, 0, 0, 0) + body


def status(code: int) -> bytes:
    return message(NLMSG_ERROR, (-code).to_bytes(4, "little", signed=True) + bytes(16))


FAMILY = message(0x10, bytes(4) + b"\x06\0\x01\0\x1c\0\0\0")  # CTRL_ATTR_FAMILY_ID: 28


def kernel(monkeypatch: pytest.MonkeyPatch, *answers: list[bytes]) -> tuple[Any, Socket]:
    sock = Socket(iter(answers))
    monkeypatch.setattr(wireguard_netlink, "socket_in", lambda *_: sock)
    host: Any = None
    return WireguardKernel(host, "/proc/self/ns/net"), sock


async def test_a_device_is_read_by_a_dump_of_several_datagrams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = message(28, bytes(4) + answer([{"PUBLIC_KEY": base64.b64encode(A)}], LISTEN_PORT=7))
    more = message(28, bytes(4) + answer([{"PUBLIC_KEY": base64.b64encode(B)}]))
    device, sock = kernel(
        monkeypatch,
        [FAMILY + status(0)],
        [part, more + message(NLMSG_DONE, bytes(4))],
    )
    config = await device.get("vxw0")
    assert config.port == 7 and set(config.peers) == {A, B}
    assert decoded(sock.sent[1]).get_attr("WGDEVICE_A_IFNAME") == "vxw0"


async def test_each_message_of_an_update_is_acknowledged_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers = [Peer(i.to_bytes(32, "big")) for i in range(101)]
    device, sock = kernel(monkeypatch, [FAMILY + status(0)], [status(0)], [status(0)])
    await device.set("vxw0", Update(peers=peers))
    assert len(sock.sent) == 3


async def test_what_the_kernel_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = kernel(monkeypatch, [FAMILY + status(0)], [status(errno.ENODEV)])
    with pytest.raises(OSError) as caught:
        await device.get("vxw0")
    assert caught.value.errno == errno.ENODEV
    device, _ = kernel(monkeypatch, [FAMILY + status(0)], [status(errno.EADDRINUSE)])
    with pytest.raises(Conflict, match="51850"):
        await device.set("vxw0", Update(port=51850))
    device, _ = kernel(monkeypatch, [status(errno.ENOENT)])
    with pytest.raises(OSError):
        await device.get("vxw0")
