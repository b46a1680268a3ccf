"""Through a host's firewall where Docker made one: what goes to and from our namespace passes.

An engine that starts where nothing forwards yet has the host forward nothing but its own bridges
(FORWARD's policy DROP). For what others want it leaves a chain, DOCKER-USER, which it makes and
never changes; two rules of ours go there. They open nothing: what may come to us our own table
says (nft.py), and a drop there stands whatever another table accepts.
Source: docs.docker.com/engine/network/packet-filtering-firewalls, iptables(8).
What stands opposite: api/docker/mirror.py, which says when.
"""

from __future__ import annotations

import shutil
import subprocess

import structlog

from agent.datapath.nft import HOST_UPLINK

log = structlog.get_logger()

CHAIN = "DOCKER-USER"
PROGRAMS = ("iptables", "ip6tables")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"  # as engines look for them
TIMEOUT = 10.0  # s; somebody else may hold the lock of iptables


def let_through() -> int:
    """Put the rules in that are missing, in the calling thread's namespace; how many were.

    Nothing where there is no such chain, or no iptables.
    """
    added = 0
    for name in PROGRAMS:
        program = shutil.which(name, path=PATH)
        if program is None or not _run(program, "-n", "-L", CHAIN):
            continue
        for way in ("-i", "-o"):
            rule = (CHAIN, way, HOST_UPLINK, "-j", "ACCEPT")
            if not _run(program, "-C", *rule) and _run(program, "-I", *rule):
                added += 1
    if added:
        log.info("firewall.opened", chain=CHAIN, rules=added)
    return added


def _run(program: str, *words: str) -> bool:
    try:
        done = subprocess.run([program, "-w", *words], capture_output=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
