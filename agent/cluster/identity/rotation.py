"""PURE: how a cluster gets another CA without anybody losing a connection.

Three statements (model.Trust), each made when all live nodes have done what the one before asks:

    INTRODUCING  both CAs are trusted, the old one issues     until all trust the new one
    RENEWING     both are trusted, the new one issues         until all have a certificate of it
    STEADY       the new one alone; the old one is retired: records that were signed under it
                 stay good

Nodes that are away (their rows and names are withdrawn) are not waited for: they are named in
the statement, and have to join anew. Nothing is kept but the statements, so any keeper that has
both keys can go on where another one stopped.
What stands opposite: service.py brings the nodes' records in, signs, and tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from agent.model import AUTHORITIES_MAX, Trust

STEADY, INTRODUCING, RENEWING = 0, 1, 2
PHASES = {STEADY: "done", INTRODUCING: "introducing", RENEWING: "renewing"}


class Member(NamedTuple):
    """What a node's record says of its identity."""

    node: str
    away: bool  # withdrawn, or it left
    trust: int  # epoch that it follows
    issuer: bytes | None  # which CA its certificate is of (DER)
    keeper: bool = False
    holds_next: bool = True  # a keeper that has been given the new CA's key


def introduce(trust: Trust, authority: bytes, by: str, stamp: int) -> Trust:
    """The statement that begins a change to `authority` (certificate, DER)."""
    return msgspec.structs.replace(
        trust,
        epoch=trust.epoch + 1,
        stamp=stamp,
        authorities=(trust.authorities[0], authority),
        by=by,
        phase=INTRODUCING,
        left_behind=(),
        signatures=(),
    )


def waiting(trust: Trust, members: Sequence[Member]) -> list[str]:
    """The nodes that are there and have not done what the statement asks."""
    return [m.node for m in members if not m.away and not _has_done(trust, m)]


def left_behind(trust: Trust, members: Sequence[Member]) -> list[str]:
    """The nodes that will have to join anew if they come back only after the next step."""
    return [m.node for m in members if m.away and not _has_done(trust, m)]


def advance(trust: Trust, members: Sequence[Member], stamp: int) -> Trust | None:
    """The next statement; None if there is none (yet)."""
    if trust.phase == STEADY or waiting(trust, members):
        return None
    behind = sorted({*trust.left_behind, *left_behind(trust, members)} & {m.node for m in members})
    shared = {"epoch": trust.epoch + 1, "stamp": stamp, "signatures": ()}
    if trust.phase == INTRODUCING:
        old, new = trust.authorities
        return msgspec.structs.replace(
            trust, authorities=(new, old), phase=RENEWING, left_behind=tuple(behind), **shared
        )
    new, *rest = trust.authorities
    # Who was away and got through all the same is not behind.
    back = {m.node for m in members if not m.away}
    return msgspec.structs.replace(
        trust,
        authorities=(new,),
        retired=(*rest, *trust.retired)[: AUTHORITIES_MAX - 2],
        phase=STEADY,
        left_behind=tuple(id for id in behind if id not in back),
        **shared,
    )


def _has_done(trust: Trust, member: Member) -> bool:
    if trust.phase == STEADY:
        return True
    if member.trust < trust.epoch:
        return False
    if trust.phase == INTRODUCING:
        return member.holds_next or not member.keeper
    return member.issuer == trust.authorities[0]
