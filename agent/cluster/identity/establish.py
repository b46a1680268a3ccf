"""A starting agent's identity: the one on disk, a new cluster's, or one got by a join token.

What stands opposite: daemon.py, which starts with it; `vxmesh cluster init` does the founding
alone. Docs: docs/identity.md.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from agent.cluster.identity import authority as ca
from agent.cluster.identity import enrol, requests, tokens
from agent.cluster.identity.enrol import Joiner
from agent.cluster.identity.files import ANEW, Files, Held
from agent.cluster.identity.founding import found_cluster, issue_own
from agent.cluster.identity.tokens import Token
from agent.errors import Invalid, Unavailable, VxmeshError

log = structlog.get_logger()

JOIN_WITHIN = 30.0  # s that nodes to join by may be silent: they may be starting as well
AGAIN = 1.0  # s
GET_TOKEN = "Run 'vxmesh cluster token' on a node of the cluster, and start with what it prints"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the settings say of identity."""

    node: str  # id, as the state file has it
    name: str
    seeds: Sequence[str]  # host:port
    token: Token | None
    life: float  # s; of certificates that this node issues
    find: Callable[[], Sequence[str]] | None = None  # further host:port, seen on the LAN by now
    within: float = JOIN_WITHIN


def no_token() -> Invalid:
    """A node without an identity was given somebody to join, and no token."""
    return Invalid("--join", "needs a join token, as this node is of no cluster yet", GET_TOKEN)


def no_seed() -> Invalid:
    """A node without an identity was given a token, and nobody to join."""
    return Invalid("--token", "says which cluster, but not where it is", "Give --join as well")


def read_token(token: str, file: str) -> Token | None:
    """The token of the settings, from a file or as it stands; None if there is none. Invalid."""
    if token:
        return tokens.parse(token)
    if not file:
        return None
    try:
        with open(file) as opened:  # noqa: PTH123
            return tokens.parse(opened.read(1024))
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"token file {file}", f"cannot be read ({error})", GET_TOKEN) from None


async def establish(files: Files, wish: Wish) -> Held:
    """The identity to start with; on disk when this returns.

    VxmeshError if there is none to be had, or what is on disk does not fit together.
    """
    held = await asyncio.to_thread(files.load)
    if held is None:
        if not wish.seeds and not wish.token:
            held = await asyncio.to_thread(found_cluster, files, wish.node, time.time(), wish.life)
            log.info("cluster.founded", cluster=held.cluster, node=held.node)
            return held
        return await _join(files, wish, "")
    if held.node != wish.node:
        raise VxmeshError(
            f"identity {files.directory}",
            f"is of node {held.node}, and the state is of node {wish.node}",
            "Restore the two from one backup. " + ANEW,
        )
    if _is_behind(held, wish.token):
        return await _join(files, wish, held.cluster)
    if ca.ends(held.certificate) > time.time():
        return held
    return await _renew_late(files, held, wish)


def _is_behind(held: Held, token: Token | None) -> bool:
    """Whether a token is of a CA that this node has not heard of: it was away while the cluster
    got another one, or the token is of another cluster, which the answer will tell."""
    if token is None:
        return False
    known = map(ca.fingerprint, (*held.trust.authorities, *held.trust.retired))
    return token.fingerprint not in known


async def _renew_late(files: Files, held: Held, wish: Wish) -> Held:
    """Another certificate in place of one that ended while the agent was away."""
    if held.issuing:
        asked = requests.make(held.node, held.record_key)
        made = issue_own(held, asked, time.time(), wish.life)
        held = replace(held, certificate=made, key=asked.key)
        await asyncio.to_thread(files.save_certificate, made, asked.key)
        log.info("certificate.renewed", node=held.node)
        return held
    if wish.token and (wish.seeds or wish.find):
        return await _join(files, wish, held.cluster)
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ca.ends(held.certificate)))
    raise VxmeshError(
        "this node's certificate",
        f"ended at {moment}, so no node of the cluster talks to it any more",
        "Run 'vxmesh cluster token' on another node, and start this one with the --join and "
        "--token that it prints: it stays the node it was, with all its data",
    )


async def _join(files: Files, wish: Wish, cluster: str) -> Held:
    """Get an identity by the token; `cluster` is the one that this node is of already."""
    assert wish.token is not None
    record_key = await asyncio.to_thread(files.read_record_key)
    if record_key is None:
        record_key = os.urandom(32)
        # First: who asks again, because the answer was lost, must be the same one.
        await asyncio.to_thread(files.save_record_key, record_key)
    joiner = Joiner(wish.node, wish.name, record_key, cluster)
    held = await _ask_around(wish, joiner)
    await asyncio.to_thread(files.save, held)
    log.info("cluster.joined", cluster=held.cluster, node=held.node)
    return held


async def _ask_around(wish: Wish, joiner: Joiner) -> Held:
    assert wish.token is not None
    deadline = time.monotonic() + wish.within
    silent: dict[str, str] = {}
    while True:
        found = wish.find() if wish.find else ()
        for target in dict.fromkeys([*wish.seeds, *found]):
            try:
                return await enrol.join(target, wish.token, joiner)
            except Unavailable as error:
                silent[target] = f"{error.what} {error.why}"
                log.info("join.silent", target=target, error=str(error))
            except VxmeshError as error:
                if target in wish.seeds:
                    raise
                silent[target] = f"{error.what} {error.why}"  # one of another cluster on the LAN
        if time.monotonic() >= deadline:
            what = "; ".join(silent.values()) or "no agent was seen on the LAN"
            raise Unavailable(
                "the cluster",
                f"cannot be joined within {wish.within:g} s: {what}",
                "See whether an agent runs there, and whether the way is open to its port",
            )
        await asyncio.sleep(AGAIN)
