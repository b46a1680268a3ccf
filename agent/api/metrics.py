"""How the agent and its name server are doing, for Prometheus.

Two sources: what is counted when it happens (`count`, or a notice of a kind in COUNTED), and
what is looked at when somebody asks. The looking is done in the loop, which owns what is looked
at; to make text of it takes 20 µs a series and is done in a thread. Every series is bounded by
kinds or networks, never by endpoints, but for those that are backends of services.
docs/metrics.md explains each.
What stands opposite: metricserver.py and control.py, which hand it out; daemon.py, which says
where to look.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from agent import __version__
from agent.api.refusals import REASONS
from agent.core.pathmtu import Measure, State
from agent.core.services import taking
from agent.core.tunnels import Tunnel
from agent.errors import VxmeshError
from agent.node import NodeState
from agent.servicemodel import HEALTHY, UNHEALTHY, UNKNOWN
from agent.views import Change

RESOLVER_WITHIN = 1.0  # s; a name server that does not answer by then is down, as far as we say
LAG_EVERY = 0.1  # s between two looks at the clock
LAG_WINDOW = 15.0  # s; the largest lag of this window or the one before is what is shown

PROBES = "vxmesh_probe_seconds"
# s; a probe of the LAN takes 1 to 10 ms, and after 0.1 s others are asked for help.
PROBE_BOUNDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
)

# Name (a counter if it ends so, a histogram if it is PROBES), labels, what it says.
SPECS: dict[str, tuple[tuple[str, ...], str]] = {
    "vxmesh_build_info": (("version", "python"), "Always 1; which build this is."),
    "vxmesh_nodes": (("state",), "Known nodes by state, this one included."),
    "vxmesh_networks": ((), "Networks of the cluster."),
    "vxmesh_endpoints": (("network",), "Endpoints of the cluster by network."),
    "vxmesh_endpoints_local": ((), "Endpoints of this node."),
    "vxmesh_sandboxes": ((), "Sandboxes of this node."),
    "vxmesh_kernel_failures": ((), "Parts of the kernel's state that failed and are retried."),
    "vxmesh_drift_repaired_total": (("kind",), "What others took away or changed, put back."),
    "vxmesh_guard_dropped_total": (("reason",), "Frames of sandboxes that the guards dropped."),
    "vxmesh_notices_total": (("kind",), "Notices told, by kind."),
    "vxmesh_replica_origins": ((), "Nodes that records are held of."),
    "vxmesh_replica_records": ((), "Records held, of all origins."),
    "vxmesh_peer_streams": ((), "Open streams to other agents."),
    "vxmesh_probe_seconds": ((), "Round trips of this node's probes that were answered."),
    "vxmesh_peer_refused_total": (("reason",), "Connections and calls refused at the peer port."),
    "vxmesh_join_refused_total": (("reason",), "Requests for a certificate that were refused."),
    "vxmesh_loop_lag_seconds": ((), "The event loop's largest lag in the last 15 to 30 s."),
    "vxmesh_resolver_up": ((), "1 if the name server answers its agent."),
    "vxmesh_resolver_rows": (
        ("of",),
        "What the name server knows, by kind.",
    ),
    "vxmesh_resolver_questions_total": (("transport",), "Questions received."),
    "vxmesh_resolver_answers_total": (("result",), "What was to be done with them."),
    "vxmesh_resolver_forwarded_total": (("transport",), "Questions sent to an upstream."),
    "vxmesh_resolver_kept_total": (("kind",), "Questions whose answer was there already."),
    "vxmesh_resolver_microseconds_total": (("of",), "Time spent on answers."),
    "vxmesh_resolver_failures_total": (("reason",), "Questions that got no proper answer."),
    "vxmesh_services": (("state",), "Services of the cluster: up, down, empty."),
    "vxmesh_service_backends": (("health",), "Backends of all services by health."),
    "vxmesh_service_connections_total": (
        ("network", "service", "backend"),
        "Connections that this node led to a backend.",
    ),
    "vxmesh_health_checks": ((), "Health checks that this node makes."),
    "vxmesh_health_changes_total": (("state",), "Endpoints of this node that came to a state."),
    "vxmesh_control_refused_total": (("reason",), "Attempts to use the agent that were refused."),
    "vxmesh_records_refused_total": (("reason",), "Deltas that a peer could not prove."),
    "vxmesh_paths": (("state",), "Paths to other nodes: unknown, whole, narrow, silent."),
    "vxmesh_tunnels": (("state",), "Ways through VXLAN: unknown, sound, checksums, blocked."),
    "vxmesh_path_mtu_min_bytes": ((), "What fits through the narrowest known path from here."),
}

# A notice of this kind counts here: the metric, which of its fields are labels, and which one
# says how much (empty: one).
COUNTED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "drift.repaired": ("vxmesh_drift_repaired_total", ("kind",), "count"),
    "control.refused": ("vxmesh_control_refused_total", ("reason",), "count"),
    "join.refused": ("vxmesh_join_refused_total", ("reason",), "count"),
}

# The name server's own counters (resolver/server.py, forward.py): metric and label.
RESOLVER: dict[str, tuple[str, str]] = {
    **{n: ("vxmesh_resolver_rows", n) for n in ("networks", "endpoints", "services", "views")},
    **{n: ("vxmesh_resolver_questions_total", n) for n in ("udp", "tcp")},
    **{
        n: ("vxmesh_resolver_answers_total", n)
        for n in ("answer", "nodata", "nxdomain", "forward", "refused")
    },
    "ready": ("vxmesh_resolver_kept_total", "ready"),
    "forward_kept": ("vxmesh_resolver_kept_total", "upstream"),
    "forward_joined": ("vxmesh_resolver_kept_total", "joined"),
    "busy_us": ("vxmesh_resolver_microseconds_total", "answering"),
    "forward_us": ("vxmesh_resolver_microseconds_total", "upstream"),
    "kept": ("vxmesh_resolver_rows", "ready"),
    "workers": ("vxmesh_resolver_rows", "processes"),
    "forwarded": ("vxmesh_resolver_forwarded_total", "udp"),
    "forwarded_tcp": ("vxmesh_resolver_forwarded_total", "tcp"),
    **{
        n: ("vxmesh_resolver_failures_total", n)
        for n in (
            "malformed",
            "errors",
            "unsent",
            "connections_refused",
            "forward_refused_busy",
            "forward_failed",
            "forward_no_upstream",
            "flooded",
        )
    },
}

Values = dict[str, dict[tuple[str, ...], float]]  # metric -> values of its labels -> value


@dataclass(slots=True)
class Sources:
    """Where to look, besides the node. The kinds are there from the start, with 0."""

    kernel_failures: Callable[[], int] = lambda: 0
    peer_streams: Callable[[], int] = lambda: 0
    resolver: Callable[[], Awaitable[Mapping[str, int]]] | None = None  # its counters
    repair_kinds: Iterable[str] = field(default_factory=tuple)
    peer_refused: Callable[[], Mapping[str, int]] = dict  # reason -> how many
    refused: Callable[[], Mapping[str, int]] = dict  # frames by reason
    health_checks: Callable[[], int] = lambda: 0
    records_refused: Callable[[], Mapping[str, int]] = dict  # by reason
    paths: Callable[[], Mapping[str, Measure]] = dict  # by node
    tunnels: Callable[[], Mapping[str, Tunnel]] = dict  # by node
    # By ids of service and endpoint.
    connections: Callable[[], Awaitable[Mapping[tuple[str, str], int]]] | None = None


class Histogram:
    """How many values were no more than each of some bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """`bounds`: rising."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last: more than all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(bound as text, values up to it), the last bound being +Inf."""
        texts = [*(str(bound) for bound in self._bounds), "+Inf"]
        return list(zip(texts, (float(n) for n in accumulate(self._counts)), strict=True))


class Metrics:
    """What is counted, and where the rest is looked up."""

    def __init__(self, node: NodeState, sources: Sources) -> None:
        self.node, self.sources = node, sources
        self._counters: dict[str, Counter[tuple[str, ...]]] = {
            name: Counter() for name in SPECS if name.endswith("_total")
        }
        for kind in sources.repair_kinds:
            self.count("vxmesh_drift_repaired_total", 0, kind=kind)
        for state in (HEALTHY, UNHEALTHY, UNKNOWN):
            self.count("vxmesh_health_changes_total", 0, state=state)
        for reason in REASONS:
            self.count("vxmesh_control_refused_total", 0, reason=reason)
        self.probes = Histogram(PROBE_BOUNDS)
        self._lags = [0.0, 0.0]  # of the window before and of this one, seconds
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        node.listeners.append(self._changed)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter of SPECS, which says what labels it has."""
        held = self._counters[name]
        key = tuple(labels[label] for label in SPECS[name][0])
        held[key] += amount  # type: ignore[assignment]

    def _changed(self, change: Change) -> None:
        for notice in change.notices:
            self.count("vxmesh_notices_total", kind=notice.kind)
            if notice.kind in COUNTED:
                name, labels, amount = COUNTED[notice.kind]
                values = {label: notice.fields.get(label, "") for label in labels}
                self.count(name, float(notice.fields[amount]) if amount else 1, **values)

    # -- the loop's lag --

    @contextlib.asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Meanwhile, look how late the loop comes to what was to be done at a certain time."""
        # Not a task that sleeps, which takes two turns of the loop: nothing wakes an idle agent
        # more often.
        loop = asyncio.get_running_loop()
        due = loop.time() + LAG_EVERY
        window = due + LAG_WINDOW
        timer: asyncio.TimerHandle

        def sample() -> None:
            nonlocal due, window, timer
            now = loop.time()
            if now > window:
                self._lags, window = [self._lags[1], 0.0], now + LAG_WINDOW
            self._lags[1] = max(self._lags[1], now - due)
            due = now + LAG_EVERY
            timer = loop.call_at(due, sample)

        timer = loop.call_at(due, sample)
        try:
            yield
        finally:
            timer.cancel()

    # -- looking --

    async def text(self) -> bytes:
        """All of it in Prometheus' text format, version 0.0.4."""
        values = self._look()
        await self._ask_resolver(values)
        await self._ask_kernel(values)
        probes = HistogramMetricFamily(
            PROBES, SPECS[PROBES][1], buckets=self.probes.buckets(), sum_value=self.probes.sum
        )
        return await asyncio.to_thread(_render, values, {PROBES: probes}, self._process)

    def _look(self) -> Values:
        node = self.node
        states: Counter[tuple[str, ...]] = Counter()
        for id in node.nodes:
            states[(node.condition(id).state,)] += 1
        replica = node.replica
        members = node.members
        networks = list(node.catalogue.all())
        one: dict[str, float] = {
            "vxmesh_networks": len(networks),
            "vxmesh_endpoints_local": sum(len(m.local) for m in members.values()),
            "vxmesh_sandboxes": len(node.sandboxes),
            "vxmesh_kernel_failures": self.sources.kernel_failures(),
            "vxmesh_replica_origins": len(replica.origins()),
            "vxmesh_replica_records": replica.count(),
            "vxmesh_peer_streams": self.sources.peer_streams(),
            "vxmesh_loop_lag_seconds": max(self._lags),
            "vxmesh_health_checks": self.sources.health_checks(),
        }
        values: Values = {name: {(): value} for name, value in one.items()}
        values["vxmesh_build_info"] = {(__version__, platform.python_version()): 1}
        values["vxmesh_nodes"] = dict(states)
        values["vxmesh_endpoints"] = {
            (node.catalogue.name(n.id),): len(members[n.id].all) if n.id in members else 0
            for n in networks
        }
        services = Counter({(state,): 0 for state in ("up", "down", "empty")})
        backends = Counter({(state,): 0 for state in (HEALTHY, UNHEALTHY, UNKNOWN)})
        for service in node.services.all():
            rows = node.backends_of(service, node.clock())
            state = "up" if taking(service, rows) else "down" if rows else "empty"
            services[(state,)] += 1
            backends.update((row.health,) for row in rows)
        values["vxmesh_services"] = {key: float(count) for key, count in services.items()}
        values["vxmesh_service_backends"] = {key: float(n) for key, n in backends.items()}
        values.update({name: dict(held) for name, held in self._counters.items()})
        values["vxmesh_peer_refused_total"] = {
            (reason,): float(count) for reason, count in self.sources.peer_refused().items()
        }
        values["vxmesh_guard_dropped_total"] = {
            (reason,): count for reason, count in self.sources.refused().items()
        }
        measured = self.sources.paths().values()
        counted = Counter({(state.value,): 0 for state in State})
        counted.update((path.state.value,) for path in measured)
        values["vxmesh_paths"] = {key: float(count) for key, count in counted.items()}
        narrowest = min((path.mtu for path in measured if path.mtu), default=0)
        values["vxmesh_path_mtu_min_bytes"] = {(): float(narrowest)}
        ways = Counter({(tunnel.value,): 0 for tunnel in Tunnel})
        ways.update((tunnel.value,) for tunnel in self.sources.tunnels().values())
        values["vxmesh_tunnels"] = {key: float(count) for key, count in ways.items()}
        refused = self.sources.records_refused()
        values["vxmesh_records_refused_total"] = {(why,): n for why, n in refused.items()}
        return values

    async def _ask_resolver(self, values: Values) -> None:
        up = False
        if self.sources.resolver is not None:
            with contextlib.suppress(VxmeshError, OSError, EOFError, TimeoutError):
                async with asyncio.timeout(RESOLVER_WITHIN):
                    counters = await self.sources.resolver()
                up = True
                for key, (name, label) in RESOLVER.items():
                    values.setdefault(name, {})[(label,)] = counters.get(key, 0)
        values["vxmesh_resolver_up"] = {(): float(up)}

    async def _ask_kernel(self, values: Values) -> None:
        """What the kernel counts of services; nothing if it cannot be read now."""
        if self.sources.connections is None:
            return
        with contextlib.suppress(VxmeshError):
            counted = await self.sources.connections()
            found: Counter[tuple[str, ...]] = Counter()
            for (id, endpoint), count in counted.items():
                service, home = self.node.services.get(id), self.node.network_of(endpoint)
                members = self.node.members.get(home)
                member = members.all.get(endpoint) if members else None
                if service and member:  # else it has just gone
                    name = self.node.catalogue.name(home)
                    found[name, service.name, member.endpoint.name] += count
            values["vxmesh_service_connections_total"] = {key: float(n) for key, n in found.items()}


class _Once(Collector):
    """What was looked at, for one rendering."""

    def __init__(self, values: Values, made: Mapping[str, Metric]) -> None:
        """`made`: what is no plain value, by name."""
        self._values, self._made = values, made

    def collect(self) -> Iterator[Metric]:
        for name, (labels, text) in SPECS.items():
            if name in self._made:
                yield self._made[name]
                continue
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, text, labels=labels)
            for key, value in self._values.get(name, {}).items():
                family.add_metric(key, value)
            yield family


def _render(values: Values, made: Mapping[str, Metric], process: CollectorRegistry) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(values, made))
    return generate_latest(registry) + generate_latest(process)
