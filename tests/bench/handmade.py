"""The anchor of throughput: a VXLAN as one makes it by hand with ip(8) and bridge(8).

On each of two hosts on the testbed's wire a bridge, a VXLAN device on it (no learning, proxy)
and a veth into a namespace; FDB and neighbour rows are static. The VTEPs are the hosts
themselves, so the same bed serves the figure of host to host.
Opposite: ours.py, which has vxmesh make the like.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent import syscalls
from agent.testbed import Host
from tests.bench import throughput, world
from tests.bench.throughput import Lane
from tests.bench.world import run

PREFIX = "vxb-hand"
VNI = 100
DEVICE, BRIDGE, PORT = f"vx{VNI}", f"br{VNI}", "port0"
MTU = 1450  # the wire's 1500, less what VXLAN over IPv4 adds
NETNS = Path("/run/netns")


@contextlib.contextmanager
def start() -> Iterator[tuple[Lane, Lane]]:
    """The VXLAN, as a way from workload to workload; and the way from host to host below it.

    It all goes at the end. Missing if there is no iperf3.
    """
    throughput.require()
    with contextlib.ExitStack() as stack:
        bed = stack.enter_context(world.temporary_bed(PREFIX, with_agents=False))
        h1, h2 = bed.hosts
        for host, other in ((h1, h2), (h2, h1)):
            stack.callback(_remove_workload, host)
            _build(host, other)
        for netns in (_workload(h2), h2.namespace):
            stack.callback(world.end, syscalls.in_netns(NETNS / netns, _serve))

        def in_workload(command: Sequence[str]) -> str:
            return syscalls.in_netns(NETNS / _workload(h1), lambda: _output(command))

        yield (
            Lane(_address(h2), in_workload),
            Lane(h2.address, lambda command: run(h1, command)),
        )


def _serve() -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    return subprocess.Popen(throughput.SERVER, stdin=null, stdout=null, stderr=null)


def _output(command: Sequence[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=world.TIMEOUT
    ).stdout


def _workload(host: Host) -> str:
    return f"{host.namespace}-workload"


def _address(host: Host) -> str:
    return f"10.200.0.{host.name[1:]}"


def _mac(host: Host) -> str:
    return f"02:51:00:00:00:{int(host.name[1:]):02x}"


def _build(host: Host, other: Host) -> None:
    workload = _workload(host)
    subprocess.run(["ip", "netns", "add", workload], check=True)
    vxlan = f"vxlan id {VNI} dstport 4789 local {host.address} nolearning proxy"
    _tool(
        ["ip", "-n", host.namespace],
        f"link add {BRIDGE} mtu {MTU} type bridge",
        f"link add {DEVICE} mtu {MTU} type {vxlan}",
        f"link add {PORT} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {workload}",
        f"link set {DEVICE} master {BRIDGE} up",
        f"link set {PORT} master {BRIDGE} up",
        f"link set {BRIDGE} up",
        f"neigh add {_address(other)} lladdr {_mac(other)} dev {DEVICE} nud permanent",
    )
    _tool(
        ["bridge", "-n", host.namespace],
        f"link set dev {DEVICE} learning off",
        f"fdb add {_mac(other)} dev {DEVICE} dst {other.address} self permanent",
    )
    _tool(
        ["ip", "-n", workload],
        f"link set eth0 address {_mac(host)} up",
        f"addr add {_address(host)}/24 dev eth0",
    )
    syscalls.in_netns(NETNS / host.namespace, _bypass_netfilter)


def _remove_workload(host: Host) -> None:
    if (NETNS / _workload(host)).exists():
        subprocess.run(["ip", "netns", "del", _workload(host)], check=True)


def _tool(command: Sequence[str], *lines: str) -> None:
    subprocess.run([*command, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def _bypass_netfilter() -> None:
    """Frames of this bridge do not go through iptables; with br_netfilter they would."""
    for family in ("ip", "ip6", "arp"):
        knob = Path(f"/proc/sys/net/bridge/bridge-nf-call-{family}tables")
        if knob.exists():
            knob.write_text("0")
