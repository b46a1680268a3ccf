"""Through a host's firewall where Docker made one: what goes to and from our namespace passes.

An engine that starts where nothing forwards yet has the host forward nothing but its own bridges
(FORWARD's policy DROP). For what others want it leaves a chain, DOCKER-USER, which it makes and
never changes; two rules of ours go there, behind those that are there: what the host's
administrator drops in it stays dropped. What none of those decides, and is for or from vxmesh0, is
accepted, so that rules of iptables that come after (Docker's, and the policy) are not asked; what
may come to us our own table says (nft.py), and a drop there stands whatever another table accepts.
Source: docs.docker.com/engine/network/packet-filtering-firewalls, iptables(8).
What stands opposite: api/docker/mirror.py, which says when; cleanup.py takes them out.
"""

from __future__ import annotations

import shutil
import subprocess

import structlog

from agent.datapath.nft import HOST_UPLINK
from agent.syscalls import in_netns

log = structlog.get_logger()

CHAIN = "DOCKER-USER"
COMMENT = "vxmesh"
PROGRAMS = ("iptables", "ip6tables")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"  # as engines look for them
TIMEOUT = 10.0  # s; somebody else may hold the lock of iptables

_OURS = tuple(
    (way, HOST_UPLINK, "-m", "comment", "--comment", COMMENT, "-j", "ACCEPT")
    for way in ("-i", "-o")
)
_RETURN = ("-j", "RETURN")  # an engine's last one, behind which nothing is asked


def let_through() -> int:
    """Have our rules behind all others, in the calling thread's namespace; how many were put
    there.

    Nothing where there is no such chain, or no iptables.
    """
    added = 0
    for name in PROGRAMS:
        program = shutil.which(name, path=PATH)
        rules = _rules(program) if program else None
        if program is None or rules is None:
            continue
        wanted = _arranged(rules)
        if rules == wanted:
            continue
        _delete(program, rules)
        for at, rule in enumerate(_OURS, wanted.index(_OURS[0]) + 1):
            added += _run(program, "-I", CHAIN, str(at), *rule) is not None
    if added:
        log.info("firewall.opened", chain=CHAIN, rules=added)
    return added


def take_out(netns: str) -> None:
    """Remove our rules in the namespace at that path."""

    def work() -> None:
        for name in PROGRAMS:
            program = shutil.which(name, path=PATH)
            if program:
                _delete(program, _rules(program) or [])

    in_netns(netns, work)


def _arranged(rules: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The chain as it should be."""
    others = [rule for rule in rules if rule not in _OURS]
    last = others[-1:] if others[-1:] == [_RETURN] else []
    return [*others[: len(others) - len(last)], *_OURS, *last]


def _delete(program: str, rules: list[tuple[str, ...]]) -> None:
    for rule in rules:
        if rule in _OURS:
            _run(program, "-D", CHAIN, *rule)


def _rules(program: str) -> list[tuple[str, ...]] | None:
    """Those of the chain, as `iptables -S` words them; None if there is no such chain."""
    text = _run(program, "-S", CHAIN)
    if text is None:
        return None
    lines = [line.replace('"', "").split() for line in text.splitlines()]
    return [tuple(words[2:]) for words in lines if words[:1] == ["-A"]]


def _run(program: str, *words: str) -> str | None:
    """What it said; None if it failed."""
    try:
        done = subprocess.run(
            [program, "-w", *words], capture_output=True, timeout=TIMEOUT, text=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
