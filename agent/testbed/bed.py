"""A testbed: hosts made of namespaces on this machine, each with an agent, joined.

    with testbed.temporary(hosts=3) as bed:
        bed.host("h1").run(["vxmesh", "network", "create", "web"], check=True)
        bed.cut("h1", "h2")

`vxmesh testbed` is the same from the command line. What is seen from outside: the hosts' files
below /run/vxmesh-testbed, so also each agent's socket. Needs root.
Opposite: fabric.py (the wire), namespaces.py (files), agents.py, processes.py, state.py (memory).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agent.errors import Conflict, Invalid, NotFound, VxmeshError
from agent.testbed import agents, engines, namespaces, processes, state
from agent.testbed.fabric import (
    CLIENT,
    CLIENT_NUMBER,
    Fabric,
    address_of,
)
from agent.testbed.host import Host
from agent.testbed.namespaces import Namespaces
from agent.testbed.state import DEFAULT_PREFIX, HostState, State

HOSTS_DEFAULT = 3
HOSTS_MAX = CLIENT_NUMBER - 1
PREFIX = re.compile(r"[a-z][a-z0-9-]{0,31}\Z")
AGENT_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
WORKLOAD_GRACE = 2.0
JOIN_TIMEOUT = 60.0  # seconds until every agent sees every other
Say = Callable[[str], None]


class Testbed:
    """A testbed that is up. Every method looks at its state anew: others may change it too."""

    __test__ = False  # no test case, whatever pytest thinks of the name

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        if not PREFIX.match(prefix):
            raise Invalid(
                f"prefix {prefix[:40]!r}", "is malformed", "Use a to z, digits and hyphens"
            )
        self.prefix = prefix
        self._fabric = Fabric(prefix)

    @classmethod
    def up(
        cls,
        hosts: int | None = None,
        *,
        ipv6: bool = False,
        underlay: int = 4,
        docker: bool = False,
        with_agents: bool = True,
        agent_options: Sequence[str] = (),
        prefix: str = DEFAULT_PREFIX,
        say: Say = lambda _: None,
        show: Say = lambda _: None,
    ) -> Testbed:
        """Make a testbed, or start what one that is there lacks.

        With `ipv6` the wire has IPv6 beside IPv4; with `underlay` 6 it has, and the agents reach
        each other by it, VXLAN included. With `docker` each host has a Docker engine of its own.

        `say` is told how far it is, `show` the lines by which hosts joined.

        `hosts` is 3 for a new one; `agent_options` are added to each agent's command line.
        Conflict if it is there with another number of hosts or another wire. If the wire fails,
        nothing is left; if an agent fails, the hosts stay, for their logs.
        """
        _require_root()
        if docker:
            engines.programs()
        if hosts is not None and not 1 <= hosts <= HOSTS_MAX:
            raise Invalid(f"--hosts {hosts}", "is out of range", f"Use 1 to {HOSTS_MAX}")
        ipv6 = ipv6 or underlay == 6
        bed = cls(prefix)
        state.create_directory(prefix)
        with state.locked(prefix):
            found = state.load(prefix)
            if found is None:
                found = bed._build(hosts or HOSTS_DEFAULT, ipv6, underlay, docker, agent_options)
                say(f"{len(found.hosts) - 1} hosts and a client, on one wire")
            else:
                bed._check_same(found, hosts, ipv6, underlay, docker)
            if with_agents:
                bed._start_missing(found, say, show)
            if found.docker:
                bed._start_engines(found, say)
        return bed

    @classmethod
    def find(cls, prefix: str = DEFAULT_PREFIX) -> Testbed:
        """The testbed that is up; NotFound if there is none."""
        bed = cls(prefix)
        bed._load()
        return bed

    @property
    def hosts(self) -> list[Host]:
        """The hosts with an agent, h1 first."""
        found = self._load()
        return [self._host(found, host) for host in found.hosts if host.name != CLIENT]

    @property
    def client(self) -> Host:
        """The outsider on the same wire."""
        return self.host(CLIENT)

    def host(self, name: str) -> Host:
        """A host, or the client, by name; NotFound names those there are."""
        found = self._load()
        return self._host(found, _pick(found, name))

    def status(self) -> dict[str, Any]:
        """What `vxmesh testbed status -o json` prints."""
        found = self._load()
        described = []
        for host in (self._host(found, h) for h in found.hosts):
            link = {
                "link": "down" if host.name in found.unplugged else "up",
                "cut_from": [b for a, b in found.cuts if a == host.name],
                "loss": found.losses.get(host.name, 0),
            }
            where = {"name": host.name, "namespace": host.namespace, "address": host.address}
            where |= {"address6": host.address6} if found.ipv6 else {}
            if host.name != CLIENT:
                where |= {
                    "agent": "running" if host.is_running else "stopped",
                    "socket": host.target,
                    "log": str(host.log),
                }
                if found.docker:
                    where["engine"] = "running" if host.is_engine_running else "stopped"
            described.append({**where, **link})
        client = described.pop()
        client.pop("name")
        return {"hosts": described, "client": client}

    def cut(self, name: str, other: str = "", *, one_way: bool = False) -> None:
        """Pull a host's cable; with `other` only the two lose each other. With `one_way` only
        what `name` sends to `other` is lost."""
        if one_way and not other:
            raise Invalid("--one-way", "needs another host", "Say which one with --from")
        if name == other:
            raise Invalid(f"cut {name}", "names one host twice", "Give two hosts")
        with self._changing() as found:
            _pick(found, name)
            if not other:
                self._fabric.plug(name, up=False)
                found.unplugged = sorted({*found.unplugged, name})
                return
            _pick(found, other)
            ways = {(name, other)} if one_way else {(name, other), (other, name)}
            found.cuts = sorted({*found.cuts, *ways})
            self._fabric.filter(found.cuts, found.losses)

    def heal(self, name: str) -> None:
        """Undo every cut and loss of a host."""
        with self._changing() as found:
            _pick(found, name)
            found.cuts = [cut for cut in found.cuts if name not in cut]
            found.losses.pop(name, None)
            self._fabric.filter(found.cuts, found.losses)
            self._fabric.plug(name, up=True)
            found.unplugged = [host for host in found.unplugged if host != name]

    def loss(self, name: str, percent: float) -> None:
        """Lose that share of the packets to and from a host; 0 for none. In steps of 0.01."""
        if not 0 <= percent <= 100:
            raise Invalid(f"loss {percent}", "is out of range", "Give a percentage, 0 to 100")
        with self._changing() as found:
            _pick(found, name)
            found.losses.pop(name, None)
            if share := round(percent, 2):
                found.losses[name] = share
            self._fabric.filter(found.cuts, found.losses)

    def kill(self, name: str, *, engine: bool = False) -> None:
        """SIGKILL a host's agent, or its Docker engine, and nothing else of the host; no error if
        it does not run."""
        with self._changing() as found:
            host = _pick(found, name, with_agent=True)
            pid, started = host.agent, host.agent_start
            if engine:
                _require_docker(found)
                pid, started = host.engine, host.engine_start

            def itself() -> list[int]:
                return [pid] if processes.is_running(pid, started) else []

            processes.end(itself, grace=0)

    def start(self, name: str) -> None:
        """Start a host's agent, and its Docker engine if it is to have one, and wait until they
        serve; no error if they run."""
        with self._changing() as found:
            host = _pick(found, name, with_agent=True)
            if not self._host(found, host).is_running:
                agents.wait_ready([self._start_agent(found, host)])
            if found.docker and not self._host(found, host).is_engine_running:
                engines.wait_ready([engines.start(self.prefix, self._host(found, host), host)])

    def down(self) -> list[int]:
        """End all that runs in the hosts and remove them; see take_down()."""
        return take_down(self.prefix)

    def _load(self) -> State:
        _require_root()
        found = state.load(self.prefix)
        if found is None:
            raise NotFound("the testbed", "is not up", "Start it with 'vxmesh testbed up'")
        return found

    @contextlib.contextmanager
    def _changing(self) -> Iterator[State]:
        with state.locked(self.prefix):
            found = self._load()
            yield found
            state.save(found)

    def _host(self, found: State, of: HostState) -> Host:
        return Host(self.prefix, found.token, of, found.ipv6)

    def _build(
        self, count: int, ipv6: bool, underlay: int, docker: bool, agent_options: Sequence[str]
    ) -> State:
        numbers = {f"h{n}": n for n in range(1, count + 1)} | {CLIENT: CLIENT_NUMBER}
        for name in ("fabric", *numbers):
            if self._fabric.exists(name):
                state.remove(self.prefix, [])
                namespace = self._fabric.namespace(name)
                raise Conflict(
                    f"network namespace {namespace}",
                    "is there, and not of a testbed",
                    f"Remove it with 'ip netns del {namespace}'",
                )
        hosts = [HostState(name, number) for name, number in numbers.items()]
        found = State(self.prefix, ipv6, hosts=hosts, agent_options=list(agent_options))
        found.underlay, found.docker = underlay, docker
        state.save(found)
        try:
            state.prepare_machine(found)
            self._fabric.build(numbers, ipv6)
            resolv_conf = state.directory_of(self.prefix) / "resolv.conf"
            resolv_conf.write_text(f"nameserver {address_of(CLIENT_NUMBER)}\n")
            for host in hosts:
                self._furnish(found, host, resolv_conf)
            state.save(found)
        except BaseException:
            _dismantle(found)
            raise
        return found

    def _furnish(self, found: State, host: HostState, resolv_conf: Path) -> None:
        """Give a host its own files, kept by a file or, if the kernel refuses, by a process."""
        directory = state.directory_of(self.prefix) / host.name
        (directory / "run").mkdir(parents=True)
        fd = namespaces.make_mounts(directory / "run", resolv_conf)
        try:
            host.mnt = str(directory / "mnt")
            try:
                namespaces.keep(fd, directory / "mnt")
            except OSError:
                within = Namespaces(self._fabric.netns(host.name), f"/proc/{os.getpid()}/fd/{fd}")
                marked = processes.environment(os.environ, host.name, found.token, "")
                host.holder = processes.spawn(
                    within, ["/bin/sleep", "infinity"], marked, "/", directory / "holder.log"
                )
                host.mnt = f"/proc/{host.holder}/ns/mnt"
        finally:
            os.close(fd)

    def _check_same(
        self, found: State, hosts: int | None, ipv6: bool, underlay: int, docker: bool
    ) -> None:
        count = len(found.hosts) - 1
        again = "Run 'vxmesh testbed down' first"
        if hosts not in (None, count):
            raise Conflict("the testbed", f"is up with {count} hosts, not {hosts}", again)
        if ipv6 and not found.ipv6:
            raise Conflict("the testbed", "is up without IPv6", again)
        if underlay == 6 and found.underlay != 6:
            raise Conflict("the testbed", "is up with an underlay of IPv4", again)
        if docker and not found.docker:
            raise Conflict("the testbed", "is up without Docker engines", again)
        for host in found.hosts:
            if not (host.mnt and Path(host.mnt).exists() and self._fabric.exists(host.name)):
                raise Conflict(f"host {host.name}", "is damaged: a namespace is gone", again)

    def _start_missing(self, found: State, say: Say, show: Say) -> None:
        """Start agents that do not run: one that others can join, then the rest at once."""
        hosts = {h.name: self._host(found, h) for h in found.hosts if h.name != CLIENT}
        missing = [h for h in found.hosts if h.name in hosts and not hosts[h.name].is_running]
        if not missing:
            return
        first = missing[:1] if len(missing) == len(hosts) else []
        for batch in (first, missing[len(first) :]):
            started = [self._start_agent(found, host) for host in batch]
            agents.prepare()
            agents.wait_ready(started)
            for agent in started:
                say(f"{agent.host}: agent runs, process {agent.pid}, log {agent.log}")
                if agent.join:
                    show(f"{agent.host}: vxmesh agent {agent.join}")
            if batch and not found.join_token:
                found.join_token = agents.read_token(started[0].socket)
                state.save(found)
        if not (found.unplugged or found.cuts or found.losses):
            agents.wait_joined({h.name: h.socket for h in hosts.values()}, JOIN_TIMEOUT)
            say(f"{len(hosts)} agents see each other")

    def _start_engines(self, found: State, say: Say) -> None:
        """Start the engines that do not run; after the agents, whose plugin they ask for.

        Those that have no image get one, also if their engine ran: whoever was to give it that may
        have been ended before.
        """
        hosts = [h for h in found.hosts if h.name != CLIENT]
        missing = [h for h in hosts if not self._host(found, h).is_engine_running]
        started = [engines.start(self.prefix, self._host(found, h), h) for h in missing]
        state.save(found)
        engines.wait_ready(started)
        for engine in started:
            say(f"{engine.host}: Docker engine runs, process {engine.pid}, log {engine.log}")
        to_fill = [h for h in (self._host(found, h) for h in hosts) if engines.lacks_image(h)]
        if to_fill and (image := engines.give_image(to_fill)):
            say(f"each engine has an image {image}, made of this machine's")

    def _start_agent(self, found: State, state_of: HostState) -> agents.Started:
        host = self._host(found, state_of)
        others = [self._host(found, h) for h in found.hosts if h.name not in (CLIENT, host.name)]
        # With --mdns they are to find each other by themselves.
        seeds = [] if "--mdns" in found.agent_options else others
        started = agents.start(
            host.name,
            host.namespaces,
            _underlay(found, host),
            next((_underlay(found, other) for other in seeds if other.is_running), ""),
            found.join_token,
            [*(["--docker"] if found.docker else []), *found.agent_options],
            found.token,
            host.socket,
            host.log,
        )
        state_of.agent, state_of.agent_start = started.pid, started.start_time
        state.save(found)
        return started


def take_down(prefix: str = DEFAULT_PREFIX) -> list[int]:
    """Remove a testbed, whole or half made; nothing to do is no error.

    Gives the processes in its network namespaces that it did not start: they are left alone,
    and while they run they keep their namespace, though without a name.
    """
    _require_root()
    Testbed(prefix)
    with state.locked(prefix) as exists:
        if not exists:
            return []
        found = state.load(prefix) or State(prefix, ipv6=False)
        return _dismantle(found)


def _dismantle(found: State) -> list[int]:
    """End the processes, agents first so that they can leave; then remove everything."""
    fabric = Fabric(found.prefix)
    names = [host.name for host in found.hosts]
    hosts = [Namespaces(fabric.netns(host.name), host.mnt) for host in found.hosts if host.mnt]
    with namespaces.devices_of(hosts) as devices:
        _end_all(found, devices)
    strangers = processes.find_strangers([fabric.netns(name) for name in names], [os.getpid()])
    fabric.remove(names)
    if found.docker:
        engines.remove_cgroups(found.prefix)
    state.remove(found.prefix, found.made)
    return strangers


def _end_all(found: State, devices: Sequence[str]) -> None:
    """End the processes; `devices` tell those that are in its hosts."""

    def ours() -> list[int]:
        return processes.find(found.token, devices)

    def running_agents() -> list[int]:
        return [h.agent for h in found.hosts if processes.is_running(h.agent, h.agent_start)]

    def running_engines() -> list[int]:
        return [h.engine for h in found.hosts if processes.is_running(h.engine, h.engine_start)]

    # Engines first, and at once: what they hold goes with the hosts, and they would start anew
    # what ends.
    processes.end(running_engines, 0)
    processes.end(running_agents, AGENT_GRACE)
    processes.end(lambda: engines.containers(found.prefix)() if found.docker else [], 0)
    processes.end(ours, WORKLOAD_GRACE)


@contextlib.contextmanager
def temporary(hosts: int = HOSTS_DEFAULT, *, prefix: str = "", **options: Any) -> Iterator[Testbed]:
    """A testbed for a test, beside any other, with options as of Testbed.up(); it always goes.

    Without a `prefix` its namespaces are called vxt-, six random digits, and the host's name.
    """
    prefix = prefix or f"vxt-{secrets.token_hex(3)}"
    try:
        yield Testbed.up(hosts, prefix=prefix, **options)
    finally:
        take_down(prefix)


def _underlay(found: State, host: Host) -> str:
    """The address by which other agents reach this host's."""
    return host.address6 if found.underlay == 6 else host.address


def _pick(found: State, name: str, with_agent: bool = False) -> HostState:
    there = [host for host in found.hosts if not (with_agent and host.name == CLIENT)]
    for host in there:
        if host.name == name:
            return host
    raise NotFound(
        f"host {name}",
        "has no agent" if name == CLIENT else "is not in the testbed",
        f"Use one of {', '.join(host.name for host in there)}",
    )


def _require_docker(found: State) -> None:
    if not found.docker:
        raise NotFound("the engine", "is not there", "Start the testbed with --docker")


def _require_root() -> None:
    if os.geteuid() != 0:
        raise VxmeshError("the testbed", "changes the kernel's namespaces", "Run it as root")
