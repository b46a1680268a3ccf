"""Services and the health of endpoints, as frozen values: the stored and gossiped form.

As model.py has the rest: msgpack arrays, a field is only ever added, at the end and with a
default. What stands opposite: servicespec.py, which makes services of what callers ask for;
core/services.py, which says where a service leads.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from agent.model import Loss

VIP, DNSRR = "vip", "dnsrr"  # a service's modes
REFUSE, ALL = "refuse", "all"  # what a service does when none of its backends is healthy
HEALTHY, UNHEALTHY, UNKNOWN = "healthy", "unhealthy", "unknown"
NO_CHECK, TCP, HTTP, RUNTIME = "none", "tcp", "http", "runtime"

# Of one service. A record of all of them at their largest stays below the 256 KiB that peers
# take of one (cluster/codec.py).
PORTS_MAX = 64
BACKENDS_MAX = 1000  # named ones; a selector may choose more
PUBLISH_ON_MAX = 256
WEIGHT_MAX = 1000
VERDICTS_MAX = 64  # services whose checks one endpoint can be under
REASON_MAX = 120  # characters of what a check says


class Port(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One port of a service. One that is published at several ports is there several times."""

    port: int  # at the VIP
    target: int  # at the backends
    protocol: str = "tcp"
    published: int = 0  # on the nodes; 0: not published
    published_at: str = ""  # only at this address of theirs; empty: at all

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.port}/{self.protocol}"


class Chosen(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What was said of one endpoint as a backend: that it is one, with which weight, that it is
    to be drained. Of one that the selector chooses too it says the weight and the drain only."""

    endpoint: str  # id
    weight: int = 1
    draining: bool = False
    since: float = 0.0  # when the drain began, seconds since the epoch
    added: bool = True  # by name; else it is a backend only as long as the selector chooses it


class Check(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How backends are looked at, each by its own node, from inside its sandbox."""

    kind: str = NO_CHECK  # tcp: a connection; http: a GET that is answered by 200 to 399;
    # runtime: as it is told; none
    path: str = ""  # http
    port: int = 0  # 0: the target of the first TCP port
    interval: float = 2.0  # s
    timeout: float = 1.0  # s
    rise: int = 1  # good ones in a row that make an unhealthy one healthy
    fall: int = 1  # bad ones in a row that make a healthy one unhealthy


class Service(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A name with virtual addresses (or none), ports, and backends, which are endpoints of its
    network. Stamps as a network's: see core/judging.py."""

    id: str
    name: str
    network: str  # id
    mode: str  # vip or dnsrr
    vips: tuple[bytes, ...]  # 4 or 16 bytes, one a family; none with dnsrr
    ports: tuple[Port, ...]
    selector: dict[str, str]  # labels that an endpoint has to have; empty: chooses none
    backends: tuple[Chosen, ...]  # sorted by endpoint
    affinity: float  # s that a client stays with its backend; 0: none
    health: Check
    publish_on: tuple[str, ...]  # node ids; empty: all
    prefer_local: bool
    all_unhealthy: str  # refuse, or all: then unhealthy ones count as healthy
    drain_timeout: float  # s after which a draining one's connections are reset; 0: never
    labels: dict[str, str]
    created: float  # seconds since the epoch
    creator: str  # node id; it took the VIPs out of what it owned
    stamp: int = 0
    deleted: bool = False
    born: int = 0
    lost: tuple[Loss, ...] = ()  # what an older one has: its name

    @property
    def published(self) -> tuple[Port, ...]:
        """Its ports that are published."""
        return tuple(port for port in self.ports if port.published)

    def chosen(self, endpoint: str) -> Chosen | None:
        """What was said of an endpoint (id)."""
        return next((each for each in self.backends if each.endpoint == endpoint), None)

    def selects(self, labels: dict[str, str]) -> bool:
        """Whether its selector chooses an endpoint with these labels."""
        wanted = self.selector.items()
        return bool(wanted) and all(labels.get(key) == value for key, value in wanted)

    def check_port(self) -> int:
        """The port of the backends that is looked at; 0 if there is none to look at."""
        targets = (port.target for port in self.ports if port.protocol == "tcp")
        return self.health.port or next(targets, 0)


class Verdict(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one service's check says of an endpoint."""

    service: str  # id
    state: str  # healthy or unhealthy
    since: float  # seconds since the epoch
    reason: str = ""  # for people; of an unhealthy one


class Health(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How an endpoint is, written by its own node, and only when it changes."""

    endpoint: str  # id
    state: str  # all in all: unhealthy if anything says so
    since: float
    reason: str = ""
    told: str = ""  # by the runtime: healthy, unhealthy; empty: it has said nothing
    told_since: float = 0.0
    told_reason: str = ""
    verdicts: tuple[Verdict, ...] = ()  # sorted by service

    def of(self, service: str) -> Literal["healthy", "unhealthy", "unknown"]:
        """How it is as a backend of a service (id). What the runtime finds unhealthy is so for
        all; else the service's own check decides, and where there is none the runtime."""
        if self.told == UNHEALTHY:
            return "unhealthy"
        for verdict in self.verdicts:
            if verdict.service == service:
                return "healthy" if verdict.state == HEALTHY else "unhealthy"
        return "healthy" if self.told == HEALTHY else "unknown"

    def why(self, service: str) -> str:
        """Why it is not healthy as a backend of a service; may be empty."""
        if self.told == UNHEALTHY:
            return self.told_reason
        return next((v.reason for v in self.verdicts if v.service == service), "")


def summed(health: Health, now: float) -> Health | None:
    """The same with its state all in all, changed `now` if it changes; None: nothing is known."""
    bad = [v for v in health.verdicts if v.state == UNHEALTHY]
    if health.told == UNHEALTHY:
        state, reason = UNHEALTHY, health.told_reason
    elif bad:
        state, reason = UNHEALTHY, bad[0].reason
    elif health.verdicts or health.told:
        state, reason = HEALTHY, ""
    else:
        return None
    since = health.since if health.state == state else now
    return msgspec.structs.replace(health, state=state, since=since, reason=reason)
