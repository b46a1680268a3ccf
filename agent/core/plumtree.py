"""Epidemic broadcast trees: how a record goes on from stream to stream.

PURE. Plumtree (Leitão, Pereira, Rodrigues: "Epidemic broadcast trees", 2007), with a tree for
each origin. A stream is *eager* for an origin, deltas go out as they come, or *lazy*: only what
one has is said (`Have`), in batches, a little later. Who is sent what it has already says so
(`Prune`, the stream becomes lazy); who is told of something that does not come asks for it
(`Graft`, the stream becomes eager). What remains eager is a tree along which records came first.

Kept to it besides: the stream with the origin itself is always eager towards its peer, and the
stream on which an origin's records came first is never pruned, so that two prunes that cross
leave nobody without. Where everyone has a stream to everyone nothing is relayed at first, since
its own node pushes it; whom that does not reach asks another, by the same rule.

What stands opposite: core/session.py, one stream; this is what those of one node share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.core.replica import ORIGINS_MAX
from agent.core.stability import Stability
from agent.core.summary import Summarizer

if TYPE_CHECKING:
    from agent.core.session import Session

# s; what lazy streams say is collected for this long (0.5 to 1.5 of it, by chance, so that of
# two ends only one has to say it). Shorter: more messages; longer: a broken tree heals later.
HAVE_DELAY = 0.1
# s, and three round trips if that is longer: so long may pass between hearing of a record and
# having it. Shorter: what is on its way is asked for again, and comes twice.
GRAFT_AFTER = 0.15
GRAFT_RETRY = 0.5  # s, and three round trips; then the next who has it is asked, or the same
GRAFT_TRIES = 4  # then it is left to the next digest


@dataclass(frozen=True, slots=True)
class Have:
    """Origin -> version: the sender has that much."""

    entries: dict[str, int]


@dataclass(frozen=True, slots=True)
class Graft:
    """Origin -> version: the sender has only that much; what comes after is to be pushed. With
    `whole` it is to be a whole state, which replaces what the sender has."""

    entries: dict[str, int]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Prune:
    """Origins whose records the sender gets on another stream."""

    origins: tuple[str, ...]


class Mesh:
    """What the sessions of one node have in common."""

    def __init__(
        self,
        me: str,
        relays: Callable[[], bool] = lambda: False,
        live: Callable[[], Iterable[str]] | None = None,
    ) -> None:
        """`relays`: whether there are nodes without a stream to each other. `live`: the nodes
        that must have seen a tombstone before it may go; None: none is ever collected."""
        self.me = me
        self.relays = relays
        self.live = live
        self.stability = Stability(me)
        self.summarizer = Summarizer()
        self._sessions: dict[str, Session] = {}
        self._parents: dict[str, Session] = {}
        self._asked: dict[str, float] = {}

    def up(self, session: Session) -> None:
        """The stream is the one to its peer from now on."""
        assert session.peer
        self.down(self._sessions.get(session.peer.node))
        self._sessions[session.peer.node] = session
        self.stability.up(session.peer.node)

    def down(self, session: Session | None) -> None:
        """The stream has ended; no error if it was not the one to its peer."""
        if session is None or not session.peer:
            return
        if self._sessions.get(session.peer.node) is session:
            del self._sessions[session.peer.node]
            self.stability.down(session.peer.node)
        self._parents = {o: s for o, s in self._parents.items() if s is not session}

    def peers(self) -> dict[str, Session]:
        """The streams by their peer."""
        return self._sessions

    def parent(self, origin: str) -> Session | None:
        """The stream on which `origin`'s records come first; None if it has gone."""
        return self._parents.get(origin)

    def parents(self) -> dict[str, Session]:
        """The same of all origins."""
        return self._parents

    def adopt(self, origin: str, session: Session) -> None:
        """Make a stream the parent."""
        self._parents[origin] = session

    def spread(self, origin: str, source: Session | None, now: float) -> None:
        """Something new of `origin` is here; `source` brought it, or it came otherwise."""
        self._asked.pop(origin, None)
        for session in self._sessions.values():
            if session is not source:
                session.note(origin, now)

    def expect(self, origin: str, now: float) -> None:
        """More of `origin` is on its way: it was asked for, or a part of much has come."""
        if len(self._asked) >= ORIGINS_MAX:
            self._asked.clear()  # of origins that do not exist; the price is to ask twice
        self._asked[origin] = now

    def expected(self, origin: str) -> float:
        """When that was last; minus infinity if it was not, or has come since."""
        return self._asked.get(origin, float("-inf"))
