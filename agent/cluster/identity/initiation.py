"""`vxmesh cluster init`: a new cluster in the state directory of a host whose agent is not running.

What stands opposite: daemon.py, which starts from what is written here, or does the same itself.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from agent import restart
from agent.cluster.identity import authority as ca
from agent.cluster.identity import tokens
from agent.cluster.identity.files import ANEW, Files
from agent.cluster.identity.founding import found_cluster
from agent.cluster.identity.tokens import Token
from agent.config import CERT_LIFE, Settings, default_address, parse_duration
from agent.errors import Conflict
from agent.store import Store


class Made(NamedTuple):
    """A new cluster."""

    cluster: str
    node: str
    fingerprint: str
    directory: Path
    token: str
    command: str  # to type on another machine


def init(settings: Settings) -> Made:
    """Make a cluster whose first node is this host. Conflict if it is of one; InUse if an agent
    holds the state."""
    files = Files(Path(settings.state_dir))
    life = parse_duration("setting cert_life", settings.cert_life, CERT_LIFE)
    address = settings.advertise or default_address()
    if files.exists():
        held = files.load()
        raise Conflict(
            "this host",
            f"is of cluster {held.cluster if held else '?'} already",
            "See 'vxmesh cluster status'; 'vxmesh agent --reset-state' sets its state aside",
        )
    disk = Store(Path(settings.state_dir))
    try:
        meta, records, _ = disk.load()
        if records or disk.load_peers():
            raise Conflict(f"state {disk.path}", "is of a node that was in a cluster", ANEW)
        node = meta.get("node") or secrets.token_hex(8)
        # First: an identity beside a state that knows no node is taken for one that was lost.
        disk.set_meta({**meta, "node": node, "boot": restart.BOOT_ID.read_text().strip()})
        held = found_cluster(files, node, time.time(), life)
    finally:
        asyncio.run(disk.close())
    assert held.issuing is not None
    fingerprint = ca.fingerprint(held.issuing.certificate)
    token = Token(fingerprint, tokens.derive(held.issuing.key, b""))
    host = f"[{address}]" if ":" in address else address
    command = f"vxmesh agent --join {host}:{settings.port} --token {token}"
    return Made(held.cluster, node, fingerprint, files.directory, str(token), command)
