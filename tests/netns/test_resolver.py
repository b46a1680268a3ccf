"""The name server on the real kernel: a host, our namespace on it, sandboxes that ask.

vxt-…-h is the host (the resolver runs there and its upstream listens there), vxt-…-o our
namespace with a bridge for each of two networks and a third that is internal, vxt-…-a, -b, -c
and -s are sandboxes: a in demo, b in back, c in both, s in shut.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import dns.reversename
import dns.rrset
import pytest

from agent.core.names import ZONE
from agent.core.resolvconf import resolv_conf
from agent.model import Endpoint, Network
from agent.notation import parse_address
from agent.resolver import feed
from agent.resolver.client import ResolverClient
from agent.resolver.feed import State, View
from agent.syscalls import in_netns, socket_in, start_time
from tests.netns.world import said

pytestmark = pytest.mark.netns

DEMO, BACK, SHUT = "d" * 16, "b" * 16, "5" * 16
UPSTREAM = "192.0.2.53"
LOOPBACK_UPSTREAM = "127.0.0.53"  # as systemd-resolved has it on the host
PREFIX = f"vxt-{os.getpid()}"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Family:
    """One family's addresses and records."""

    type: str

    def at(self, net: int, number: int) -> str:
        """An address in demo, back or shut, which are 1, 2 and 3; the gateway's number is 1."""
        return f"10.9{net}.0.{number}" if self.type == "A" else f"fd9{net}::{number:x}"

    def reverse(self, net: int, number: int) -> str:
        """The name of an address, for PTR."""
        return str(dns.reversename.from_address(self.at(net, number))).rstrip(".")

    @property
    def outside(self) -> str:
        """What the host's resolver answers."""
        return "203.0.113.9" if self.type == "A" else "2001:db8::9"


V4, V6 = Family("A"), Family("AAAA")
FAMILIES = pytest.mark.parametrize("by", [V4, V6], ids=["v4", "v6"])

# What an agent does, in a process that can be killed; it prints the resolver's pid.
FEEDER = """
import asyncio, sys
from pathlib import Path
from agent.resolver.client import ResolverClient
from tests.netns.test_resolver import base_state

async def main():
    run_dir, netns, conf, marker = sys.argv[1:]
    state = base_state(marker)
    client = ResolverClient(Path(run_dir), netns, lambda: state, resolv_conf=conf)
    await client.connect_or_spawn()
    print(client.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


def network(id: str, name: str, subnets: tuple[str, ...], internal: bool = False) -> Network:
    return Network(
        id, name, "overlay", subnets, (), "", 1, 0, internal, False, {}, {}, created=0.0, creator=""
    )


def endpoint(id: int, of: str, name: str, *addresses: str) -> Endpoint:
    aliases = ("web",) if name in ("one", "two") else ()
    parsed = tuple(parse_address(address) for address in addresses)
    return Endpoint(f"{id:016x}", of, name, b"\2" + bytes(5), parsed, aliases)


def base_state(marker: str = "first") -> State:
    """All that the agent of this host knows; `marker` is a name that tells states apart."""
    networks = [
        network(DEMO, "demo", ("10.91.0.0/16", "fd91::/64")),
        network(BACK, "back", ("10.92.0.0/24", "fd92::/64")),
        network(SHUT, "shut", ("10.93.0.0/24", "fd93::/64"), internal=True),
    ]
    endpoints = [
        endpoint(1, DEMO, "one", "10.91.0.2", "fd91::2"),
        endpoint(2, DEMO, "two", "10.91.0.3", "fd91::3"),
        endpoint(3, BACK, "db", "10.92.0.2", "fd92::2"),
        endpoint(4, BACK, "two", "10.92.0.3", "fd92::3"),
        endpoint(5, SHUT, "safe", "10.93.0.2", "fd93::2"),
        endpoint(6, DEMO, marker, "10.91.0.6"),
        *(endpoint(100 + n, DEMO, f"many{n}", f"10.91.1.{n}") for n in range(200)),
    ]
    endpoints += [
        Endpoint(
            f"{1000 + n:016x}", DEMO, f"many{n}", bytes(6),
            (bytes((10, 91, 1, n)), parse_address(f"fd91::1:{n:x}")), ("many",),
        )
        for n in range(200)
    ]  # fmt: skip
    views = [
        View(parse_address(family.at(net, number)), seen)
        for family in (V4, V6)
        for net, number, seen in (
            (1, 2, (DEMO,)), (2, 2, (BACK,)), (1, 3, (DEMO, BACK)), (2, 3, (DEMO, BACK)),
            (3, 2, (SHUT,)),
        )
    ]  # fmt: skip
    return State(networks, endpoints, views)


@dataclass
class Upstream:
    """A resolver of the host: remembers every name that it was asked for, answers 203.0.113.9."""

    netns: str
    addresses: tuple[str, ...] = (UPSTREAM, LOOPBACK_UPSTREAM)
    seen: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for address in self.addresses:
            sock = socket_in(self.netns, socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((address, 53))
            sock.settimeout(0.05)
            self.threads.append(threading.Thread(target=self._serve, args=(sock,)))
            self.threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        while not self.ended.is_set():
            try:
                wire, peer = sock.recvfrom(65535)
            except TimeoutError:
                continue
            query = dns.message.from_wire(wire)
            name = query.question[0].name
            self.seen.append(name.to_text().lower())
            response = dns.message.make_response(query, recursion_available=True)
            family = V6 if query.question[0].rdtype == dns.rdatatype.AAAA else V4
            response.answer.append(dns.rrset.from_text(name, 60, "IN", family.type, family.outside))
            sock.sendto(response.to_wire(), peer)
        sock.close()

    def names(self) -> list[str]:
        """What it was asked for, in that order; once each, as a slow answer is asked for again."""
        return list(dict.fromkeys(self.seen))

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


@dataclass
class Bed:
    """The namespaces, and who is started in them."""

    directory: Path
    upstream: Upstream
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.directory

    @property
    def netns(self) -> str:
        return path("o")

    @property
    def conf(self) -> Path:
        return self.directory / "resolv.conf"

    def start_agent(self, marker: str = "first") -> tuple[subprocess.Popen[str], int]:
        """A feeding client on the host, in a process of its own; with the resolver's pid."""
        script = [sys.executable, "-c", FEEDER, str(self.run_dir), self.netns, str(self.conf)]
        process = subprocess.Popen(
            ["nsenter", f"--net={path('h')}", *script, marker],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        self.processes.append(process)
        return process, int(said(process.stdout))

    def client(self, state: State) -> ResolverClient:
        """A feeding client in this process. It finds the resolver and need not start it."""
        return ResolverClient(self.run_dir, self.netns, lambda: state, resolv_conf=str(self.conf))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        asyncio.run(self.client(base_state()).stop())


def path(host: str) -> str:
    return f"/run/netns/{PREFIX}-{host}"


@pytest.fixture(scope="module")
def namespaces() -> Iterator[None]:
    hosts = ("h", "o", "a", "b", "c", "s")
    ports: list[tuple[str, ...]] = [  # bridge, sandbox, interface, addresses
        ("demo", "a", "eth0", "10.91.0.2/16", "fd91::2/64"),
        ("demo", "c", "eth0", "10.91.0.3/16", "fd91::3/64"),
        ("back", "b", "eth0", "10.92.0.2/24", "fd92::2/64"),
        ("back", "c", "eth1", "10.92.0.3/24", "fd92::3/64"),
        ("shut", "s", "eth0", "10.93.0.2/24", "fd93::2/64"),
    ]
    gateways = {
        "demo": ("10.91.0.1/16", "fd91::1/64"),
        "back": ("10.92.0.1/24", "fd92::1/64"),
        "shut": ("10.93.0.1/24", "fd93::1/64"),
    }
    try:
        for host in hosts:
            run(f"ip netns add {PREFIX}-{host}")
            run(f"ip -n {PREFIX}-{host} link set lo up")
        ours = f"{PREFIX}-o"
        for bridge, addresses in gateways.items():
            run(f"ip -n {ours} link add {bridge} type bridge")
            run(f"ip -n {ours} link set {bridge} up")
            for address in addresses:
                nodad = " nodad" if ":" in address else ""
                run(f"ip -n {ours} addr add {address} dev {bridge}{nodad}")
        for bridge, sandbox, device, *given in ports:
            inside = f"{PREFIX}-{sandbox}"
            run(
                f"ip -n {ours} link add p-{sandbox}-{bridge} type veth peer {device} netns {inside}"
            )
            run(f"ip -n {ours} link set p-{sandbox}-{bridge} master {bridge} up")
            run(f"ip -n {inside} link set {device} up")
            for address in given:
                nodad = " nodad" if ":" in address else ""
                run(f"ip -n {inside} addr add {address} dev {device}{nodad}")
        for sandbox, gateway in (("a", "10.91.0.1"), ("b", "10.92.0.1"), ("c", "10.91.0.1")):
            run(f"ip -n {PREFIX}-{sandbox} route add default via {gateway}")
        # The uplink of ours, and where the host's resolver is.
        run(f"ip -n {PREFIX}-h addr add {UPSTREAM}/32 dev lo")
        run(f"ip -n {PREFIX}-h link add vxmesh0 type veth peer uplink netns {ours}")
        run(f"ip -n {PREFIX}-h addr add 169.254.83.1/30 dev vxmesh0")
        run(f"ip -n {PREFIX}-h link set vxmesh0 up")
        run(f"ip -n {ours} addr add 169.254.83.2/30 dev uplink")
        run(f"ip -n {ours} link set uplink up")
        yield
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", f"{PREFIX}-{host}"], capture_output=True)


@pytest.fixture
def bed(namespaces: None, tmp_path: Path) -> Iterator[Bed]:
    upstream = Upstream(path("h"))
    made = Bed(tmp_path, upstream)
    made.conf.write_text(f"nameserver {UPSTREAM}\n")
    try:
        upstream.start()
        yield made
    finally:
        upstream.stop()
        made.end()


def ask(
    sandbox: str,
    text: str,
    type: str = "A",
    where: str = "10.91.0.1",
    source: str | None = None,
    tcp: bool = False,
    timeout: float = 20,
) -> dns.message.Message:
    """A question from inside a sandbox. dnspython drops answers from another address."""
    query = dns.message.make_query(text, type)
    send: Callable[..., dns.message.Message] = dns.query.tcp if tcp else dns.query.udp
    return in_netns(path(sandbox), lambda: send(query, where, timeout=timeout, source=source))


def found(response: dns.message.Message) -> list[str]:
    return sorted(str(rdata) for rrset in response.answer for rdata in rrset)


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come to hold in time"
        time.sleep(0.01)


@contextlib.contextmanager
def standing_in_for(*addresses: str) -> Iterator[Upstream]:
    """An upstream that has these addresses on the host, whoever has them elsewhere."""
    stand_in = Upstream(path("h"), addresses)
    try:
        for address in addresses:
            run(f"ip -n {PREFIX}-h addr add {address}/32 dev lo")
        stand_in.start()
        yield stand_in
    finally:
        stand_in.stop()
        for address in addresses:
            run(f"ip -n {PREFIX}-h addr del {address}/32 dev lo")


@FAMILIES
def test_who_asks_decides_what_is_seen(bed: Bed, by: Family) -> None:
    bed.start_agent()
    demo, back = by.at(1, 1), by.at(2, 1)
    assert found(ask("a", "one", by.type, demo)) == [by.at(1, 2)]
    assert found(ask("a", "two.demo", by.type, demo)) == [by.at(1, 3)]
    assert found(ask("a", f"two.demo.{ZONE}", by.type, demo)) == [by.at(1, 3)]
    assert found(ask("a", "web", by.type, demo)) == [by.at(1, 2), by.at(1, 3)]
    assert found(ask("b", "two", by.type, back)) == [by.at(2, 3)]
    assert ask("b", "one", by.type, back).rcode() == dns.rcode.NXDOMAIN
    assert ask("a", f"db.back.{ZONE}", by.type, demo).rcode() == dns.rcode.NXDOMAIN
    # c is in both: the first network of its view counts, the long name chooses
    assert found(ask("c", "two", by.type, demo)) == [by.at(1, 3)]
    assert found(ask("c", "two.back", by.type, demo)) == [by.at(2, 3)]
    assert found(ask("c", "db", by.type, back)) == [by.at(2, 2)]
    assert found(ask("a", by.reverse(1, 3), "PTR", demo)) == [f"two.demo.{ZONE}."]
    assert ask("a", by.reverse(2, 2), "PTR", demo).rcode() == dns.rcode.NXDOMAIN


@FAMILIES
def test_the_answer_leaves_from_the_address_that_was_asked(bed: Bed, by: Family) -> None:
    """c asks either gateway from either of its addresses, and one that came later."""
    bed.start_agent()
    back, ours = by.at(2, 1), [by.at(1, 2)]
    assert found(ask("c", "one", by.type, back, source=by.at(2, 3))) == ours
    # The question comes in on the other network's bridge; the routes take the answer home.
    assert found(ask("c", "one", by.type, back, source=by.at(1, 3))) == ours
    for tcp in (False, True):
        assert found(ask("a", "one", by.type, by.at(1, 1), tcp=tcp)) == ours
    later = f"{by.at(1, 77)}/{16 if by is V4 else 64}"
    nodad = " nodad" if by is V6 else ""
    run(f"ip -n {PREFIX}-o addr add {later} dev demo{nodad}")
    try:
        assert found(ask("a", "one", by.type, by.at(1, 77))) == ours
    finally:
        run(f"ip -n {PREFIX}-o addr del {later} dev demo")


@FAMILIES
def test_what_is_ours_never_leaves_and_the_rest_does(bed: Bed, by: Family) -> None:
    bed.start_agent()
    gateway = by.at(1, 1)
    ours = [
        "nosuch",
        "nosuch.demo",
        "x.y.demo",
        "demo",
        "one",
        "one.demo",
        ZONE,
        f"nosuch.{ZONE}",
        f"nosuch.demo.{ZONE}",
        f"db.back.{ZONE}",
        f"one.nosuch.{ZONE}",
        "localhost",
        by.reverse(1, 99),
        by.reverse(3, 2),
    ]
    for text in ours:
        for type in ("A", "AAAA", "PTR", "MX", "SOA", "TXT", "ANY"):
            for tcp in (False, True):
                assert ask("a", text, type, gateway, tcp=tcp).rcode() in (
                    dns.rcode.NOERROR,
                    dns.rcode.NXDOMAIN,
                )
    assert bed.upstream.seen == []
    assert found(ask("a", "example.com", by.type, gateway)) == [by.outside]
    assert found(ask("a", "example.net", by.type, gateway, tcp=True)) == [by.outside]
    ask("a", "8.8.8.8.in-addr.arpa", "PTR", gateway)
    assert bed.upstream.names() == ["example.com.", "example.net.", "8.8.8.8.in-addr.arpa."]


@FAMILIES
def test_strangers_and_internal_networks_have_no_way_out(bed: Bed, by: Family) -> None:
    bed.start_agent()
    strange = f"{by.at(1, 200)}/{16 if by is V4 else 64}"
    run(f"ip -n {PREFIX}-a addr add {strange} dev eth0{' nodad' if by is V6 else ''}")
    own = by.at(1, 200)
    try:
        stranger = ask("a", "example.com", by.type, by.at(1, 1), source=own)
        assert stranger.rcode() == dns.rcode.REFUSED
        known = ask("a", "one", by.type, by.at(1, 1), source=own)
        assert known.rcode() == dns.rcode.NXDOMAIN
    finally:
        run(f"ip -n {PREFIX}-a addr del {strange} dev eth0")
    assert found(ask("s", "safe", by.type, by.at(3, 1))) == [by.at(3, 2)]
    assert ask("s", "example.com", by.type, by.at(3, 1)).rcode() == dns.rcode.REFUSED
    # The host itself asks across the uplink: it is no sandbox, which ends any loop by it.
    assert ask("h", "example.com", by.type, "169.254.83.2").rcode() == dns.rcode.REFUSED
    assert bed.upstream.seen == []


@FAMILIES
def test_tcp_and_truncation(bed: Bed, by: Family) -> None:
    bed.start_agent()
    cut = ask("a", "many", by.type, by.at(1, 1))
    assert cut.flags & dns.flags.TC
    assert 10 < len(cut.answer[0]) < 200
    assert len(ask("a", "many", by.type, by.at(1, 1), tcp=True).answer[0]) == 200


def test_the_hosts_loopback_is_asked_and_ourselves_are_not(bed: Bed) -> None:
    bed.conf.write_text(f"nameserver 169.254.83.2\nnameserver {LOOPBACK_UPSTREAM}\n")
    bed.start_agent()
    assert found(ask("a", "example.com")) == ["203.0.113.9"]
    ourselves = ("169.254.83.2", "10.91.0.1")
    bed.conf.write_text("".join(f"nameserver {address}\n" for address in ourselves))
    with standing_in_for(*ourselves) as stand_in:
        assert ask("a", "example.org").rcode() == dns.rcode.SERVFAIL
        assert stand_in.seen == []
        for address in ourselves:  # to whom questions of the host would have come
            assert found(ask("h", "heard.example", where=address)) == ["203.0.113.9"]
    bed.conf.write_text(f"nameserver {UPSTREAM}\n")
    assert found(ask("a", "example.org")) == ["203.0.113.9"]
    assert bed.upstream.names() == ["example.com.", "example.org."]


def test_names_outlive_the_agent_and_the_next_one_replaces_what_is_stale(bed: Bed) -> None:
    agent, pid = bed.start_agent("first")
    os.kill(agent.pid, signal.SIGKILL)
    agent.wait()
    assert start_time(pid)
    assert os.getsid(pid) == pid
    for _ in range(20):
        assert found(ask("a", "first.demo")) == ["10.91.0.6"]
    assert found(ask("a", "example.com")) == ["203.0.113.9"]
    _, again = bed.start_agent("second")
    assert again == pid
    assert found(ask("a", "second.demo")) == ["10.91.0.6"]
    assert ask("a", "first.demo").rcode() == dns.rcode.NXDOMAIN


def test_it_is_killed_and_the_agent_brings_it_back(bed: Bed) -> None:
    _, pid = bed.start_agent()
    os.kill(pid, signal.SIGKILL)

    def answers() -> bool:
        try:
            return found(ask("a", "one", timeout=0.3)) == ["10.91.0.2"]
        except (OSError, dns.exception.DNSException):
            return False

    until(answers)
    assert int((bed.run_dir / feed.LOCK).read_text()) != pid


def test_garbage_from_a_sandbox(bed: Bed) -> None:
    _, pid = bed.start_agent()
    rng = random.Random(11)
    with socket_in(path("b"), socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(2000):
            sock.sendto(rng.randbytes(rng.randrange(1400)), ("10.92.0.1", 53))
    with socket_in(path("b"), socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.connect(("10.92.0.1", 53))
        sock.sendall(rng.randbytes(1000))

    def answers() -> bool:
        # Asked again and again, as resolvers do: what found no room behind all of that is lost.
        with contextlib.suppress(dns.exception.Timeout):
            return found(ask("a", "one", timeout=1)) == ["10.91.0.2"]
        return False

    until(answers)
    assert start_time(pid)


@FAMILIES
def test_a_c_library_finds_both_forms(bed: Bed, by: Family) -> None:
    """getent, with the resolv.conf that a sandbox has."""
    bed.start_agent()
    own = bed.directory / "sandbox.conf"
    own.write_text(resolv_conf([by.at(1, 1)], ["demo"]))
    hosts = "ahostsv4" if by is V4 else "ahostsv6"
    for name, address in (
        ("two", by.at(1, 3)),
        ("two.demo", by.at(1, 3)),
        (f"two.demo.{ZONE}", by.at(1, 3)),
        ("example.com", by.outside),
    ):
        look_up = f"mount --bind {own} /etc/resolv.conf && getent {hosts} {name}"
        command = ["nsenter", f"--net={path('c')}", "unshare", "--mount", "sh", "-c", look_up]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout.split()[:1] == [address], (name, done)
    assert set(bed.upstream.seen) == {"example.com."}


async def test_100_000_names(bed: Bed) -> None:
    """Fed while questions are asked; the old state answers until the new one is whole."""
    await asyncio.to_thread(bed.start_agent, "small")
    base = base_state("large")
    endpoints = [
        Endpoint(f"{n + 10_000:016x}", DEMO, f"n{n}", bytes(6), (bytes((10, 91, *divmod(n, 256))),))
        for n in range(256, 65_536)
    ]
    endpoints += [
        Endpoint(f"{n + 90_000:016x}", DEMO, f"m{n}", bytes(6), (b"\xfd" + n.to_bytes(15, "big"),))
        for n in range(100_000 - len(endpoints) - len(base.endpoints))
    ]
    whole = State(base.networks, [*base.endpoints, *endpoints], base.views)
    assert len(whole.endpoints) == 100_000
    client = bed.client(whole)
    await client.connect_or_spawn()
    loop = asyncio.get_running_loop()
    started, cpu = loop.time(), time.process_time()
    replacing = asyncio.create_task(client.replace(whole))
    longest, last = 0.0, loop.time()
    while not replacing.done():
        await asyncio.sleep(0)
        longest, last = max(longest, loop.time() - last), loop.time()
    await replacing
    taken, cpu = loop.time() - started, time.process_time() - cpu
    assert found(await asyncio.to_thread(ask, "a", "n65535.demo")) == ["10.91.255.255"]
    missing = await asyncio.to_thread(ask, "a", "small.demo")
    assert missing.rcode() == dns.rcode.NXDOMAIN
    assert (await client.stats()).counters["endpoints"] == 100_000
    batch = feed.Batch()
    batch.put(endpoint(1, DEMO, "renamed", "10.91.0.2"))
    at = loop.time()
    client.send(batch)
    await client.flush()
    changed = loop.time() - at
    assert found(await asyncio.to_thread(ask, "a", "renamed")) == ["10.91.0.2"]
    pid = client.pid
    pages = int((await asyncio.to_thread(Path(f"/proc/{pid}/statm").read_text)).split()[1])
    print(
        f"100,000 names in force after {taken:.3f} s, {cpu:.3f} s of the agent's CPU (with the "
        f"spinning beside it), its loop never longer than {longest * 1000:.1f} ms without a turn; "
        f"one more change {changed * 1000:.1f} ms; resolver {pages * 4096 / 1e6:.0f} MB"
    )
    await client.close()
