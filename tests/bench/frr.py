"""The anchor: FRR's EVPN (zebra and bgpd) between two hosts on the testbed's wire.

Both hosts peer over iBGP and announce the MACs that their bridge has; MACs are put there with
`bridge -batch`, as static entries of a port. What FRR then writes on the other host is an FDB
row for each MAC, and no neighbour row.
Source: https://docs.frrouting.org/en/stable-8.4/evpn.html. Opposite: ours.py.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from agent.testbed import Host
from tests.bench import world
from tests.bench.observe import Late, Observer
from tests.bench.world import Missing, mac_of, run

PREFIX = "vxb-frr"
DAEMONS = "/usr/lib/frr:/usr/libexec/frr:/usr/sbin"
LOGS = Path("/var/tmp/frr")  # where each daemon makes a directory, whatever its /run is
READY_TIMEOUT = 30.0  # seconds until the hosts know each other's VTEP
VNI = 100
DEVICE, BRIDGE, PORT = f"vx{VNI}", f"br{VNI}", "port0"


class Frr:
    """Two hosts whose FRR daemons know each other."""

    def __init__(self, hosts: list[Host], pids: list[list[int]], directory: Path) -> None:
        """`pids` are the daemons of each host, `directory` is for files."""
        self._h1, self._h2 = hosts
        self._pids = pids
        self._directory = directory
        self._observer = Observer(self._h2.call, DEVICE)

    def announce(self, count: int) -> float:
        """Seconds from the start of `bridge -batch` with that many MACs on h1 until the FDB
        rows are all in h2's kernel."""
        return self._batch(f"fdb add {{}} dev {PORT} master static\n", count, count)

    def withdraw(self, count: int) -> float:
        """Seconds from the start of `bridge -batch` until the rows of announce() are all gone."""
        return self._batch(f"fdb del {{}} dev {PORT} master\n", count, 0)

    def one(self, number: int) -> float:
        """Seconds from the start of `bridge fdb add` on h1 until the row is in h2's kernel."""
        entry = [mac_of(number), "dev", PORT, "master"]
        with self._observer.watch(1, 0, at_once=True) as watch:
            begin = time.monotonic()
            run(self._h1, ["bridge", "fdb", "add", *entry, "static"])
            took = watch.result() - begin
        with self._observer.watch(0, 0) as watch:
            run(self._h1, ["bridge", "fdb", "del", *entry])
            watch.result()
        return took

    def memory(self) -> list[float]:
        """Resident MiB of bgpd and zebra together, on h1 and on h2."""
        return [world.memory(pids) for pids in self._pids]

    def close(self) -> None:
        """Stop observing."""
        self._observer.close()

    def _batch(self, line: str, count: int, rows: int) -> float:
        file = self._directory / "batch"
        file.write_text("".join(line.format(mac_of(i)) for i in range(count)))
        world.settle([pid for pids in self._pids for pid in pids])
        with self._observer.watch(rows, 0) as watch:
            begin = time.monotonic()
            run(self._h1, ["bridge", "-batch", str(file)])
            return watch.result() - begin


@contextlib.contextmanager
def start(directory: Path) -> Iterator[Frr]:
    """Hosts with FRR, ready to announce; it all goes at the end. Missing if FRR is not here."""
    programs = [shutil.which(name, path=DAEMONS) for name in ("zebra", "bgpd")]
    zebra, bgpd = programs
    if zebra is None or bgpd is None or shutil.which("bridge") is None:
        raise Missing("FRR's zebra and bgpd are not here. Install them with 'apt-get install frr'")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logs_removed())
        bed = stack.enter_context(world.temporary_bed(PREFIX, with_agents=False))
        pids: list[list[int]] = []
        for host, peer in zip(bed.hosts, reversed(bed.hosts), strict=True):
            _add_bridge(host)
            config = directory / f"bgpd-{host.name}.conf"
            config.write_text(_config(host.address, peer.address))
            config.chmod(0o644)
            run_dir = host.run_dir / "frr"
            run_dir.mkdir()
            shutil.chown(run_dir, "frr", "frr")
            log = stack.enter_context((directory / f"frr-{host.name}.log").open("wb"))
            pids.append([])
            for command in (
                [zebra, "-f", "/dev/null", "-s", "90000000"],
                [bgpd, "-f", str(config)],
            ):
                process = host.popen(
                    [*command, "-A", "127.0.0.1", "-P", "0"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
                stack.callback(world.end, process)
                pids[-1].append(process.pid)
        for host, peer in zip(bed.hosts, reversed(bed.hosts), strict=True):
            _wait_ready(host, peer.address)
        frr = Frr(bed.hosts, pids, directory)
        stack.callback(frr.close)
        yield frr


def _add_bridge(host: Host) -> None:
    world.configure(
        host,
        f"""link add {BRIDGE} type bridge
        link set {BRIDGE} up
        link add {DEVICE} type vxlan id {VNI} dstport 4789 local {host.address} nolearning
        link set {DEVICE} master {BRIDGE} up
        link add {PORT} type veth peer name port1
        link set {PORT} master {BRIDGE} up
        link set port1 up
        """,
    )
    run(host, ["bridge", "link", "set", "dev", DEVICE, "learning", "off", "neigh_suppress", "on"])


def _config(address: str, peer: str) -> str:
    return f"""router bgp 65000
 bgp router-id {address}
 no bgp default ipv4-unicast
 neighbor {peer} remote-as 65000
 neighbor {peer} timers 1 3
 neighbor {peer} timers connect 1
 address-family l2vpn evpn
  neighbor {peer} activate
  advertise-all-vni
 exit-address-family
"""


def _wait_ready(host: Host, peer: str) -> None:
    """The row that floods to a peer's VTEP comes with the peer's first route (type 3)."""
    deadline = time.monotonic() + READY_TIMEOUT
    while f"00:00:00:00:00:00 dst {peer}" not in run(
        host, ["bridge", "fdb", "show", "dev", DEVICE]
    ):
        if time.monotonic() > deadline:
            raise Late(f"FRR on {host.name} does not know {peer} after {READY_TIMEOUT:.0f} s")
        time.sleep(0.1)


@contextlib.contextmanager
def _logs_removed() -> Iterator[None]:
    """Remove what appears below LOGS meanwhile."""
    before = set(LOGS.iterdir()) if LOGS.is_dir() else None
    try:
        yield
    finally:
        for path in LOGS.iterdir() if LOGS.is_dir() else ():
            if before is None or path not in before:
                shutil.rmtree(path, ignore_errors=True)
        if before is None:
            with contextlib.suppress(OSError):
                LOGS.rmdir()
