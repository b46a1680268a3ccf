"""The wire of a testbed: a network namespace for each host, and one with a bridge as the switch.

Stands where the machine's administrator stands: it uses ip(8) and nft(8), not datapath/, so that
what it tests is not what it is made with. Cuts and losses are rules of the switch (the kernels
that vxmesh meets may lack netem). Opposite: namespaces.py has what else makes a host.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from agent import syscalls
from agent.errors import Timeout, Unsupported, VxmeshError
from agent.testbed.namespaces import mount_points

NETNS_DIR = "/run/netns"
SWITCH = "fabric"
BRIDGE = "switch"
DEVICE = "eth0"  # of a host
MTU = 1500
CLIENT = "client"
CLIENT_NUMBER = 100
IPV4 = "10.99.0."
IPV6 = "fd99::"
SIOCGIFFLAGS, IFF_RUNNING = 0x8913, 0x40  # netdevice(7)
CARRIER_TIMEOUT = 10.0  # seconds
PACKAGES = {"ip": "iproute2", "nft": "nftables"}


def address_of(number: int) -> str:
    """The IPv4 address of a host on the wire."""
    return f"{IPV4}{number}"


def address6_of(number: int) -> str:
    """The IPv6 address of a host on the wire, if it has one: the same number in decimal."""
    return f"{IPV6}{number}"


def port_of(host: str) -> str:
    """The switch port that a host is plugged into."""
    return f"p-{host}"


class Fabric:
    """The namespaces and the switch of the testbed whose namespaces start with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.switch = self.namespace(SWITCH)

    def namespace(self, host: str) -> str:
        """The name, for `ip netns`, of a host's network namespace."""
        return f"{self._prefix}-{host}"

    def netns(self, host: str) -> str:
        """The path of a host's network namespace."""
        return f"{NETNS_DIR}/{self.namespace(host)}"

    def exists(self, host: str) -> bool:
        """Whether that network namespace is there: the name alone may be a leftover file."""
        return self.netns(host) in mount_points()

    def build(self, hosts: Mapping[str, int], ipv6: bool) -> None:
        """Make the switch and plug in every host, by name and number; none may exist before."""
        _ip([], [f"netns add {self.namespace(name)}" for name in (SWITCH, *hosts)])
        switch = [f"link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"]
        for name in hosts:
            port, namespace = port_of(name), self.namespace(name)
            switch += [
                f"link add {port} mtu {MTU} type veth"
                f" peer name {DEVICE} mtu {MTU} netns {namespace}",
                f"link set {port} master {BRIDGE} addrgenmode none up",
            ]
        # No address of its own: a switch that speaks would be seen by those who count packets.
        switch += [f"link set {BRIDGE} addrgenmode none up", "link set lo up"]
        _ip(["-n", self.switch], switch)
        syscalls.in_netns(self.netns(SWITCH), _bypass_netfilter)
        for name, number in hosts.items():
            _ip(["-n", self.namespace(name)], _addressing(number, ipv6))
        self._wait_for_carrier(list(hosts))

    def remove(self, hosts: Sequence[str]) -> None:
        """Remove the namespaces that exist, and with them every device."""
        names = [name for name in (*hosts, SWITCH) if self.exists(name)]
        if names:
            _ip([], [f"netns del {self.namespace(name)}" for name in names])

    def plug(self, host: str, up: bool) -> None:
        """Put a host's cable in or pull it: the host sees its carrier come or go."""
        _ip(["-n", self.switch], [f"link set {port_of(host)} {'up' if up else 'down'}"])
        if up:
            self._wait_for_carrier([host])

    def _wait_for_carrier(self, hosts: Sequence[str]) -> None:
        """Return when both ends of each cable work. The kernel lets a device that got its
        carrier wait up to a second before it sends (net/core/link_watch.c)."""
        ends = {(self.netns(SWITCH), port_of(host)) for host in hosts}
        ends |= {(self.netns(host), DEVICE) for host in hosts}
        deadline = time.monotonic() + CARRIER_TIMEOUT
        while ends := {end for end in ends if not _has_carrier(*end)}:
            if time.monotonic() > deadline:
                raise Timeout("the testbed's wire", f"has no carrier at {sorted(ends)}")
            time.sleep(0.01)

    def filter(self, cuts: Sequence[tuple[str, str]], losses: Mapping[str, float]) -> None:
        """Drop what goes from one host to another of each cut, and of each host's packets, both
        ways, a percentage. Replaces all that was dropped before, at once."""
        _run(["nft", "-f", "-"], render(cuts, losses), self.netns(SWITCH))


def render(cuts: Sequence[tuple[str, str]], losses: Mapping[str, float]) -> str:
    """The switch's ruleset as nft(8) reads it, to stand in the place of whatever is there."""
    rules = [f'iifname "{port_of(a)}" oifname "{port_of(b)}" drop' for a, b in cuts]
    for host, percent in losses.items():
        # nft refuses a comparison that always holds
        chance = f"numgen random mod 10000 < {round(percent * 100)} " if percent < 100 else ""
        rules += [f'{side} "{port_of(host)}" {chance}drop' for side in ("iifname", "oifname")]
    lines = ["table bridge vxm", "delete table bridge vxm"]
    if rules:
        hook = "type filter hook forward priority 0; policy accept;"
        body = "\n".join(f"    {line}" for line in (hook, *rules))
        lines += [f"table bridge vxm {{\n  chain forward {{\n{body}\n  }}\n}}"]
    return "\n".join(lines) + "\n"


def _addressing(number: int, ipv6: bool) -> list[str]:
    lines = [
        "link set lo up",
        f"addr add {address_of(number)}/24 brd + dev {DEVICE}",
        f"link set {DEVICE} up",
    ]
    if ipv6:  # no detection of duplicates: the address is to be usable at once
        lines.append(f"addr add {address6_of(number)}/64 dev {DEVICE} nodad")
    if number != CLIENT_NUMBER:
        lines.append(f"route add default via {address_of(CLIENT_NUMBER)}")
        if ipv6:
            lines.append(f"route add ::/0 via {address6_of(CLIENT_NUMBER)}")
    return lines


def _bypass_netfilter() -> None:
    """A switch does not show its frames to iptables; br_netfilter would, in this namespace too."""
    for family in ("ip", "ip6", "arp"):
        knob = Path(f"/proc/sys/net/bridge/bridge-nf-call-{family}tables")
        if knob.exists():
            knob.write_text("0")


def _has_carrier(netns: str, device: str) -> bool:
    def work() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("16sh14x", device.encode(), 0)
            _, flags = struct.unpack("16sh14x", fcntl.ioctl(sock, SIOCGIFFLAGS, request))
        return bool(flags & IFF_RUNNING)

    return syscalls.in_netns(netns, work)


def _ip(options: Sequence[str], lines: Sequence[str]) -> None:
    _run(["ip", *options, "-batch", "-"], "\n".join(lines) + "\n")


def _run(command: Sequence[str], text: str, netns: str = "") -> None:
    """Run a tool with `text` on its stdin, in the network namespace `netns` if given."""

    def work() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=text, text=True, capture_output=True)

    try:
        done = syscalls.in_netns(netns, work) if netns else work()
    except FileNotFoundError as error:
        if error.filename != command[0]:
            raise
        raise Unsupported(
            "the testbed",
            f"needs the program {command[0]}",
            f"Install it with 'apt-get install {PACKAGES[command[0]]}'",
        ) from None
    if done.returncode != 0:
        raise VxmeshError(
            "the testbed's wire",
            f"cannot be changed: {' '.join(command)} said {done.stderr.strip()!r}",
            "Run 'vxmesh testbed down', then up again",
        )


def prepare_netns_dir() -> list[str]:
    """Make what `ip netns add` would make silently; what of it was not there before, to undo."""
    made = []
    if not Path(NETNS_DIR).is_dir():
        made.append(f"directory {NETNS_DIR}")
        Path(NETNS_DIR).mkdir(mode=0o755, parents=True)
    if NETNS_DIR not in mount_points():
        made.append(f"mount {NETNS_DIR}")
    return made


def undo(made: Sequence[str]) -> None:
    """Take away what was made for the testbed, unless somebody else uses it now.

    Whoever adds a namespace asks nobody: it may come at any moment, so it is the kernel that says
    whether there is one.
    """
    for entry in reversed(made):
        kind, _, path = entry.partition(" ")
        # Gone, or in use: at it or below it is a mount, in it a file.
        with _bearing(errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY):
            if any(Path(path).iterdir()):
                continue
            if kind == "mount":
                while path in mount_points():
                    syscalls.umount(path)
            else:
                Path(path).rmdir()


@contextlib.contextmanager
def _bearing(*numbers: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
