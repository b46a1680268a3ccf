"""The table of docs/drivers.md, each cell out of packets that were sent for it.

A driver that refuses what a cell is about has "not offered" there, if it says so in words.
`VXMESH_GOLDEN=write` writes the table anew; read the difference before you keep it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.testbed import Testbed, temporary
from tests.netns.world import World

pytestmark = pytest.mark.netns
PAGE = Path(__file__).parents[2] / "docs/drivers.md"
BEGIN, END = "<!-- made by tests/netns/test_driver_table.py -->\n", "<!-- end -->\n"
COLUMNS = ("same node", "other node", "outside", "published port", "name", "isolation")
FAMILIES = {"v4": (4,), "v6": (6,), "both": (4, 6)}
CHOSEN = {"v4": (), "v6": ("--ipv6-only",), "both": ("--ipv6",)}  # addresses of a network
ROWS = [(f"`{d}`", f) for d in ("overlay", "bridge", "macvlan", "host", "none") for f in FAMILIES]
YES, NO, REFUSED = "yes", "no", "not offered"
SOON = 60.0  # s
PORT = 18700  # of a server in the workload; what is published is counted from here
# Listens with both families at once, where there are both.
SERVER = """\
import socket, sys
dual = socket.has_dualstack_ipv6()
server = socket.create_server(("", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=dual)
while True: server.accept()[0].close()
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"


@pytest.fixture(scope="module")
def bed_of_both() -> Iterator[Testbed]:
    """Two hosts whose wire has IPv4 and IPv6."""
    with temporary(hosts=2, ipv6=True) as made:
        yield made


Ask = Callable[[int], bool]  # whether a packet of that family does what it should
Cells = tuple[str, ...]  # of a row, as they should be; none: that is not known


class Rows:
    """The rows of one driver, and somebody in another network, on each host."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.apart_in = world.network("--ipv6")
        self.apart = {host: world.workload(host, self.apart_in) for host in ("h1", "h2")}
        for host, name in self.apart.items():
            for family in (4, 6):
                ask = functools.partial(self.pings, host, name, self.at("client", family), family)
                world.wait(ask, "it can send")
        self._port = PORT

    def at(self, host: str, family: int) -> str:
        """A host's address on the wire."""
        found = self.world.host(host)
        return found.address if family == 4 else found.address6

    def pings(self, host: str, name: str, to: str, family: int) -> bool:
        """Whether one of three packets is answered; never where there is no address."""
        ping = ("ping", f"-{family}", "-c", "3", "-i", "0.2", "-W", "1", to)
        return bool(to) and self.world.inside(host, name, *ping).returncode == 0

    def address(self, host: str, name: str, network: str, family: int) -> str:
        seen = self.world.read(host, "endpoint", "inspect", name, "--network", network)
        return next((a for a in seen["addresses"] if (":" in a) == (family == 6)), "")

    def connects(self, host: str, port: int, family: int) -> bool:
        ask = (sys.executable, "-c", CONNECT, self.at(host, family), str(port))
        return self.world.run("client", *ask).returncode == 0

    def serves(self, host: str, name: str, *options: str) -> bool:
        """Run a server that is published, if that can be."""
        self._port += 1
        publish = ("--publish", f"{self._port}:{PORT}")
        command = ("-d", "--wait=30", "--", sys.executable, "-c", SERVER, str(PORT))
        done = self.world.try_vx("h1", "run", "--name", name, *options, *publish, *command)
        if done.returncode:
            assert "publish" in done.stderr or "at its own address" in done.stderr, done.stderr
            self.world.vx("h1", "run", "--name", name, *options, *command)
        ask = ("h1", name, sys.executable, "-c", CONNECT, "localhost", str(PORT))
        self.world.wait(lambda: not self.world.inside(*ask).returncode, "it listens and lives")
        return done.returncode == 0

    def removed(self, made: list[tuple[str, str]]) -> None:
        """Of these workloads of hosts all were there to the end; now they go: the next ones
        may be on the same wire, or in the same stack."""
        for host, name in made:
            self.world.vx(host, "exec", name, "--", "true")
            pid = self.world.read(host, "sandbox", "inspect", name)["pid"]
            self.world.vx(host, "sandbox", "rm", name, "--wait=10")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def row(self, cells: list[Ask | str], families: tuple[int, ...], wanted: Cells) -> list[str]:
        """What stands in the cells. Where something should get through it is asked for again: what
        is done is done in the kernels, but names, and neighbours, may take a moment."""
        found = []
        for title, ask, should in itertools.zip_longest(COLUMNS, cells, wanted):
            gets_through = should is not None and (should == NO) == (title == "isolation")
            deadline = time.monotonic() + SOON
            told = cell(ask, families)
            while gets_through and told != should and time.monotonic() < deadline:
                told = cell(ask, families)
            found.append(told)
        return found

    def reached_from_apart(self, to: Callable[[int], str]) -> Ask:
        return lambda family: (
            not any(self.pings(host, name, to(family), family) for host, name in self.apart.items())
        )

    def networked(
        self, driver: str, families: tuple[int, ...], wanted: Cells, *options: str
    ) -> list[str]:
        """Of overlay, bridge or macvlan: the cells of a row."""
        world, name = self.world, f"{driver}-{''.join(map(str, families))}"
        net = world.network("--driver", driver, *options)
        is_published = self.serves("h1", name, "--network", net)
        port, two = self._port, world.workload("h1", net)
        made = [("h1", name), ("h1", two)]
        address = functools.partial(self.address, "h1", name, net)
        cells: list[Ask | str] = [lambda f: self.pings("h1", two, address(f), f)]
        if driver == "bridge":
            refused = world.try_vx("h2", "run", "--network", net, "--", "true")
            assert refused.returncode and "is a bridge on h1" in refused.stderr, refused.stderr
            cells.append(REFUSED)
        else:
            far = world.workload("h2", net)
            made.append(("h2", far))
            cells.append(lambda f: self.pings("h2", far, address(f), f))
        cells += [
            lambda f: self.pings("h1", two, self.at("client", f), f),
            (lambda f: self.connects("h1", port, f)) if is_published else REFUSED,
            lambda f: self.pings("h1", two, name, f),
            self.reached_from_apart(address),
        ]
        found = self.row(cells, families, wanted)
        self.removed(made)
        world.vx("h1", "network", "rm", net, "--wait=10")
        return found

    def host(self, families: tuple[int, ...], wanted: Cells) -> list[str]:
        world, name = self.world, f"host-{''.join(map(str, families))}"
        assert not self.serves("h1", name, "--network", "host"), "its ports are the node's own"
        for host in ("h1", "h2"):
            world.vx(host, "run", "--network", "host", "--name", f"{name}-{host}", "-d", "--",
                     "sleep", "3600")  # fmt: skip
        assert world.try_vx("h1", "resolve", name).returncode == 4, "no name of its own"
        at = functools.partial(self.at, "h1")
        cells: list[Ask | str] = [
            lambda f: self.pings("h1", f"{name}-h1", at(f), f),
            lambda f: self.pings("h2", f"{name}-h2", at(f), f),
            lambda f: self.pings("h1", name, self.at("client", f), f),
            REFUSED,
            REFUSED,
            self.reached_from_apart(at),
        ]
        found = self.row(cells, families, wanted)
        self.removed([("h1", name), ("h1", f"{name}-h1"), ("h2", f"{name}-h2")])
        return found

    def none(self, families: tuple[int, ...], wanted: Cells) -> list[str]:
        world, name = self.world, f"none-{''.join(map(str, families))}"
        assert not self.serves("h1", name, "--network", "none"), "there is nothing to publish at"
        shown = json.loads(world.inside("h1", name, "ip", "-j", "addr").stdout)
        assert [link["ifname"] for link in shown] == ["lo"]
        for family in families:
            loopback = "127.0.0.1" if family == 4 else "::1"
            assert self.pings("h1", name, loopback, family), "it can send"
        cells: list[Ask | str] = [
            lambda f: self.pings("h1", name, self.at("h1", f), f),
            lambda f: self.pings("h1", name, self.at("h2", f), f),
            lambda f: self.pings("h1", name, self.at("client", f), f),
            REFUSED,
            lambda f: self.pings("h1", name, self.apart["h1"], f),
            self.reached_from_apart(lambda _: ""),
        ]
        found = self.row(cells, families, wanted)
        self.removed([("h1", name)])
        return found


@pytest.fixture(scope="module")
def rows(bed_of_both: Testbed) -> Iterator[Rows]:
    world = World(bed_of_both)
    try:
        yield Rows(world)
    finally:
        world.clean()


def cell(ask: Ask | str, families: tuple[int, ...]) -> str:
    """What stands in the table: of what both families do alike one word."""
    if isinstance(ask, str):
        return ask
    works = [family for family in families if ask(family)]
    if works and len(works) < len(families):
        return f"v{works[0]} only"
    return YES if works else NO


def wire(world: World, families: tuple[int, ...]) -> list[str]:
    """Options of a macvlan network on the hosts' own wire."""
    client, words = world.bed.client, ["-O", "parent=eth0"]
    if 4 in families:
        words += ["--subnet", "10.99.0.0/24", "--ip-range", "10.99.0.128/25"]
        words += ["--gateway", client.address]
    if 6 in families:
        words += ["--subnet", "fd99::/64"]  # in which nobody gets one of the hosts' by chance
        words += ["--gateway", client.address6]
    return words


def table() -> dict[tuple[str, ...], tuple[str, ...]]:
    """The page's: driver and family -> cells."""
    _, found, _ = parts()
    rows = [tuple(line.strip("| ").split(" | ")) for line in found.splitlines()[3:-1]]
    return {row[:2]: row[2:] for row in rows}


def parts() -> list[str]:
    """The page before its table, the table between its marks, and what follows."""
    return re.split(f"({BEGIN}.*?{END})", PAGE.read_text(), flags=re.DOTALL)


def write(row: tuple[str, ...], cells: tuple[str, ...]) -> None:
    before, _, after = parts()
    rows = table() | {row: cells}
    lines = [("driver", "family", *COLUMNS), ("---",) * (2 + len(COLUMNS))]
    lines += [(*key, *rows[key]) for key in ROWS if key in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    PAGE.write_text(f"{before}{BEGIN}{text}{END}{after}")


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_row_of_the_page_is_what_the_kernel_does(rows: Rows, row: tuple[str, str]) -> None:
    driver, families = row[0].strip("`"), FAMILIES[row[1]]
    is_golden = os.environ.get("VXMESH_GOLDEN") == "write"
    wanted = () if is_golden else table()[row]
    if driver in ("host", "none"):
        cells = getattr(rows, driver)(families, wanted)
    elif driver == "macvlan":
        cells = rows.networked(driver, families, wanted, *wire(rows.world, families))
    else:
        cells = rows.networked(driver, families, wanted, *CHOSEN[row[1]])
    if is_golden:
        write(row, tuple(cells))
    assert dict(zip(COLUMNS, table()[row], strict=True)) == dict(zip(COLUMNS, cells, strict=True))


def test_the_page_has_these_rows_alone() -> None:
    assert list(table()) == ROWS
