"""What another node's record of a service, or of health, may say, and how much. PURE.

What stands opposite: agent/views.py, which asks before a record becomes a part of the views;
core/bounds.py has the same of the other kinds, docs/security.md lists all.
"""

from __future__ import annotations

import math

from agent.core import bounds
from agent.errors import Invalid
from agent.model import STAMP_MAX
from agent.notation import parse_address, parse_labels, shorten
from agent.servicemodel import (
    ALL,
    BACKENDS_MAX,
    DNSRR,
    HEALTHY,
    HTTP,
    NO_CHECK,
    PORTS_MAX,
    PUBLISH_ON_MAX,
    REASON_MAX,
    REFUSE,
    RUNTIME,
    TCP,
    UNHEALTHY,
    VERDICTS_MAX,
    VIP,
    WEIGHT_MAX,
    Check,
    Health,
    Port,
    Service,
)

INTERVAL_MIN, INTERVAL_MAX = 0.1, 3600.0  # s between two checks of one backend
ROW_MAX = 100  # checks in a row that rise and fall may ask for
SPAN_MAX = 30 * 86400.0  # s; of affinity and of draining
PATH_MAX = 512  # characters of what is asked of a backend by HTTP


def check_service(value: Service, id: str) -> None:
    """Invalid or ValueError if a service's record cannot be worked with."""
    bounds.check_ids(value.id, value.network, value.creator, *value.publish_on)
    bounds.check_ids(*(each.endpoint for each in value.backends))
    bounds.check_name(value.name)
    bounds.check_times(value.created, *(each.since for each in value.backends))
    sound = value.id == id and value.mode in (VIP, DNSRR) and value.all_unhealthy in (REFUSE, ALL)
    sound = sound and len(value.vips) <= 2 and {len(vip) for vip in value.vips} <= {4, 16}
    sound = sound and len(value.ports) <= PORTS_MAX and len(value.backends) <= BACKENDS_MAX
    sound = sound and len(value.publish_on) <= PUBLISH_ON_MAX and len(value.lost) <= 1
    sound = sound and all(0 <= each.weight <= WEIGHT_MAX for each in value.backends)
    sound = sound and all(map(_is_port, value.ports)) and _is_check(value.health)
    sound = sound and all(0 <= s <= SPAN_MAX for s in (value.affinity, value.drain_timeout))
    sound = sound and 0 <= value.stamp <= STAMP_MAX and 0 <= value.born <= STAMP_MAX
    if not sound:
        raise Invalid("record", f"is not sound: {shorten(repr(value), 120)}")
    parse_labels(value.selector, "selector")
    parse_labels(value.labels)
    for loss in value.lost:
        bounds.check_ids(loss.winner)
        bounds.check_texts(loss.what, loss.value)


def check_health(value: Health, id: str) -> None:
    """Invalid or ValueError if a record of health cannot be worked with."""
    bounds.check_ids(value.endpoint, *(verdict.service for verdict in value.verdicts))
    bounds.check_times(value.since, value.told_since, *(v.since for v in value.verdicts))
    states = {value.state, *(verdict.state for verdict in value.verdicts)}
    texts = (value.reason, value.told_reason, *(verdict.reason for verdict in value.verdicts))
    sound = value.endpoint == id and states <= {HEALTHY, UNHEALTHY}
    sound = sound and value.told in ("", HEALTHY, UNHEALTHY)
    sound = sound and len(value.verdicts) <= VERDICTS_MAX
    sound = sound and all(len(text) <= REASON_MAX and text.isprintable() for text in texts)
    if not sound:
        raise Invalid("record", f"is not sound: {shorten(repr(value), 120)}")


def _is_port(value: Port) -> bool:
    if value.published_at:
        parse_address(value.published_at)
    whole = 1 <= value.port <= 65535 and 1 <= value.target <= 65535
    return whole and value.protocol in ("tcp", "udp") and 0 <= value.published <= 65535


def _is_check(value: Check) -> bool:
    times = value.interval, value.timeout
    return (
        value.kind in (NO_CHECK, TCP, HTTP, RUNTIME)
        and len(value.path) <= PATH_MAX
        and value.path.isprintable()
        and value.path.isascii()
        and " " not in value.path
        and 0 <= value.port <= 65535
        and all(math.isfinite(s) and INTERVAL_MIN <= s <= INTERVAL_MAX for s in times)
        and 1 <= value.rise <= ROW_MAX
        and 1 <= value.fall <= ROW_MAX
    )
