"""Services that callers ask for, parsed and checked once: past here every field is sound by itself.

Whether it fits what exists (names, addresses and published ports taken) is agent/node/services.py's
to say. What stands opposite: proto/control.proto's ServiceSettings.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from agent import notation
from agent.core.servicebounds import INTERVAL_MAX, INTERVAL_MIN, PATH_MAX, ROW_MAX, SPAN_MAX
from agent.errors import Invalid
from agent.servicemodel import (
    ALL,
    DNSRR,
    HTTP,
    NO_CHECK,
    PORTS_MAX,
    PUBLISH_ON_MAX,
    REFUSE,
    RUNTIME,
    TCP,
    VIP,
    WEIGHT_MAX,
    Check,
    Port,
)

NO_HEALTH = Check()
AFFINITY_DEFAULT = 10_800.0  # s; three hours, as Kubernetes' ClientIP affinity has it


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A service to create, or what is to change of one."""

    name: str = ""
    network: str = ""  # name, id or prefix
    mode: str = VIP
    vips: tuple[bytes, ...] = ()  # none: free ones are chosen
    ports: tuple[Port, ...] = ()
    selector: dict[str, str] = field(default_factory=dict)
    affinity: float = 0.0
    health: Check = NO_HEALTH
    publish_on: tuple[str, ...] = ()  # nodes: names, ids or prefixes
    prefer_local: bool = False
    all_unhealthy: str = REFUSE
    drain_timeout: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)


def parse_service(
    name: str,
    network: str,
    *,
    mode: str = "",
    vips: Sequence[str] = (),
    ports: Sequence[Port] = (),
    selector: dict[str, str] | None = None,
    affinity: str = "",
    affinity_timeout: float = 0.0,
    health: Check | None = None,
    publish_on: Sequence[str] = (),
    prefer_local: bool = False,
    all_unhealthy: str = "",
    drain_timeout: float = 0.0,
    labels: dict[str, str] | None = None,
) -> ServiceSpec:
    """Check each field of a service; Invalid names the first that is wrong.

    Times are in seconds, 0 stands for the default.
    """
    what = f"service {notation.shorten(name)}" if name else "service"
    mode = _one_of("mode", mode or VIP, (VIP, DNSRR))
    affinity = _one_of("affinity", affinity or "none", ("none", "client"))
    if affinity_timeout and affinity == "none":
        raise Invalid("--affinity-timeout", "says nothing without affinity", "Give --affinity too")
    seconds = _span("--affinity-timeout", affinity_timeout or AFFINITY_DEFAULT)
    parsed = tuple(notation.parse_address(vip) for vip in vips)
    if len({len(vip) for vip in parsed}) != len(parsed):
        raise Invalid(what, "has several addresses of one family", "Give one of IPv4, one of IPv6")
    if parsed and mode == DNSRR:
        raise Invalid(what, "has an address, which dnsrr is to be without", "Leave --ip out")
    _check_ports(what, ports)
    if len(publish_on) > PUBLISH_ON_MAX:
        raise Invalid(what, f"names {len(publish_on)} nodes", f"Name at most {PUBLISH_ON_MAX}")
    return ServiceSpec(
        notation.parse_name(name, "service") if name else "",
        network,
        mode,
        parsed,
        tuple(ports),
        notation.parse_labels(selector or {}, "selector"),
        seconds if affinity == "client" else 0.0,
        health or NO_HEALTH,
        tuple(dict.fromkeys(publish_on)),
        prefer_local,
        _one_of("all-unhealthy", all_unhealthy or REFUSE, (REFUSE, ALL)),
        _span("--drain-timeout", drain_timeout),
        notation.parse_labels(labels or {}),
    )


def check_whole(spec: ServiceSpec) -> None:
    """Invalid if the fields of a service, each sound by itself, do not go together."""
    what = f"service {spec.name}"
    if not spec.ports and spec.mode == VIP:
        raise Invalid(what, "has no port", "Give --port PORT[:TARGET][/udp]")
    targets = [port.target for port in spec.ports if port.protocol == "tcp"]
    if spec.health.kind in (TCP, HTTP) and not (spec.health.port or targets):
        raise Invalid(
            what, "has no TCP port whose health could be checked", "Give --health-port, or a port"
        )
    if spec.publish_on and not any(port.published for port in spec.ports):
        raise Invalid(what, "publishes no port", "Give --publish too, or leave --publish-on out")
    if spec.mode == DNSRR and spec.affinity and not any(port.published for port in spec.ports):
        raise Invalid(what, "has no balancing that affinity could be of", "Use --mode vip")


def parse_port(
    port: int, target: int = 0, protocol: str = "", published: int = 0, published_at: str = ""
) -> Port:
    """A port of a service; Invalid if a number or the protocol is out of range."""
    for number in (port, target or port, published or port):
        if not 1 <= number <= 65535:
            raise Invalid(f"port {number}", "is out of range", "Use 1 to 65535")
    protocol = protocol or "tcp"
    if protocol not in ("tcp", "udp"):
        raise Invalid(f"protocol {notation.shorten(protocol)}", "is unknown", "Use tcp or udp")
    if published_at:
        published_at = notation.format_address(notation.parse_address(published_at))
        if not published:
            raise Invalid(f"address {published_at}", "has no port to publish", "Give one")
    return Port(port, target or port, protocol, published, published_at)


def parse_check(
    kind: str,
    path: str = "",
    port: int = 0,
    interval: float = 0.0,
    timeout: float = 0.0,
    rise: int = 0,
    fall: int = 0,
) -> Check:
    """How backends are to be looked at; 0 and "" are defaults. Invalid names what is wrong."""
    kind = _one_of("health", kind or NO_CHECK, (NO_CHECK, TCP, HTTP, RUNTIME))
    path = path or ("/" if kind == HTTP else "")
    plain = path.isascii() and path.isprintable() and " " not in path and len(path) <= PATH_MAX
    if path and (kind != HTTP or not path.startswith("/") or not plain):
        raise Invalid(
            f"health path {notation.shorten(path)}", "is malformed", "Write http:/healthz"
        )
    if not 0 <= port <= 65535:
        raise Invalid(f"health port {port}", "is out of range", "Use 1 to 65535")
    standard = Check()
    interval = interval or standard.interval
    timeout = timeout or min(standard.timeout, interval)
    for name, seconds in (("interval", interval), ("timeout", timeout)):
        if not math.isfinite(seconds) or not INTERVAL_MIN <= seconds <= INTERVAL_MAX:
            raise Invalid(
                f"--health-{name} {seconds:g}",
                "is out of range",
                f"Use {INTERVAL_MIN:g} to {INTERVAL_MAX:g} seconds",
            )
    for name, count in (("rise", rise), ("fall", fall)):
        if not 0 <= count <= ROW_MAX:
            raise Invalid(f"--health-{name} {count}", "is out of range", f"Use 1 to {ROW_MAX}")
    return Check(kind, path, port, interval, timeout, rise or 1, fall or 1)


def parse_weight(weight: int) -> int:
    """A backend's weight; Invalid if out of range."""
    if not 0 <= weight <= WEIGHT_MAX:
        raise Invalid(f"weight {weight}", "is out of range", f"Use 0 to {WEIGHT_MAX}")
    return weight


def chosen(spec: ServiceSpec, fields: Iterable[str]) -> dict[str, object]:
    """Those fields of a spec that are meant, by name; Invalid if one is none of its."""
    known = {f for f in ServiceSpec.__dataclass_fields__ if f not in ("name", "network", "mode")}
    wanted = list(fields)
    for name in wanted:
        if name not in known:
            raise Invalid(
                f"field {notation.shorten(name)}", "cannot be changed", "Make a new service"
            )
    return {name: getattr(spec, name) for name in wanted}


def _check_ports(what: str, ports: Sequence[Port]) -> None:
    if len(ports) > PORTS_MAX:
        raise Invalid(what, f"has {len(ports)} ports", f"Give at most {PORTS_MAX}")
    targets: dict[tuple[str, int], int] = {}
    for port in ports:
        if targets.setdefault((port.protocol, port.port), port.target) != port.target:
            raise Invalid(f"port {port.text}", "has two targets", "Give one --port for it")
    plain = [msgspec.structs.replace(port, target=0) for port in ports]
    for port in plain:
        if plain.count(port) > 1:
            raise Invalid(f"port {port.text}", "is given twice", "Give each once")
    at = [(port.protocol, port.published, port.published_at) for port in ports if port.published]
    for protocol, published, address in at:
        same = [a for p, number, a in at if (p, number) == (protocol, published)]
        if len(same) > 1 and (same.count(address) > 1 or "" in same):
            raise Invalid(
                f"port {published}/{protocol}", "is published twice", "Publish each port once"
            )


def _one_of(what: str, text: str, known: Collection[str]) -> str:
    if text not in known:
        raise Invalid(f"{what} {notation.shorten(text)}", "is unknown", f"Use {' or '.join(known)}")
    return text


def _span(flag: str, seconds: float) -> float:
    if not math.isfinite(seconds) or not 0 <= seconds <= SPAN_MAX:
        raise Invalid(f"{flag} {seconds:g}", "is out of range", f"Use 0 to {SPAN_MAX:g} seconds")
    return seconds
