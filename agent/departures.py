"""Nodes that go, from beginning to end: lost ones are removed, this one hands over and leaves.

What stands opposite: node/departures.py changes the node, core/removal.py decides who may,
cluster/consent.py carries.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

import structlog

from agent.core.removal import ATTEMPT_WITHIN, Answer, Ask, Attempt, Verdict
from agent.errors import Conflict, InUse, Invalid, NotFound, Timeout, Unavailable, VxmeshError
from agent.node import NodeState
from agent.notation import shorten
from agent.operations import Operations

log = structlog.get_logger()

POLL = 0.02  # s
# s that a node's stream may seem to live after the verdict that it is gone: cluster/link.py, STALE.
# The verdict itself is no ground to doubt the stream: it may be another node's, which alone does
# not reach that one, and who hears it by its stream would consent until the next message came.
LINKED_FOR = 2.0
ASK_AGAIN = 0.2  # s until a voter for whom it does is asked again
TRY_FOR = 4.0  # s that a voter may be silent: an agent that starts again is back by then
RIVAL_WITHIN = ATTEMPT_WITHIN + 2.0  # s for another one's removal to be done and heard of
# What an error says of a node that lives, or may do so.
FORCE = (
    "or, if it is not yours any more, cut it off with 'vxmesh node rm --force {name}': its "
    "workloads go on running without the others, and its addresses are handed out again"
)
LISTED = 5  # workloads that an error names


class Farewells(Protocol):
    """What cluster/ offers to nodes that go."""

    async def ask(self, voter: str, ask: Ask) -> Answer: ...

    async def release(self, ask: Ask, voters: list[str]) -> None: ...

    async def deliver(self, peer: str) -> None: ...


class Handover(NamedTuple):
    """What a node that left gave away: ids, and how many addresses."""

    network: str
    to: str
    addresses: int


class Departures:
    """`rm` and `leave`.

    `announce_left` tells the others that this node goes (cluster/detector.py), `ended` that its
    agent is to end.
    """

    def __init__(
        self,
        node: NodeState,
        operations: Operations,
        cluster: Farewells,
        announce_left: Callable[[], Awaitable[None]],
        ended: Callable[[], None],
    ) -> None:
        self.node = node
        self._operations = operations
        self._cluster = cluster
        self._ended = ended
        self._announce_left = announce_left
        self._one_at_a_time = asyncio.Lock()

    # -- lost nodes --

    async def remove_nodes(
        self, refs: Sequence[str], wait: float = 0.0, *, force: bool = False
    ) -> list[str]:
        """Remove nodes that will not come back, all or none; their ids.

        Those that were removed before are no error. With `force` they may live. InUse if one
        does and that was not said, or is this node, Unavailable if a node
        whose consent it takes does not give it; nothing is changed then.
        """
        self.node.check_stays()
        ids = list(dict.fromkeys(self._find(ref) for ref in refs))
        async with self._one_at_a_time:
            lost = {id for id in ids if not self.node.is_removed(id)}
            for id in sorted(lost):
                if not force:
                    await self._until_unlinked(id)
                self._check_lost(id, force)
            if lost:
                await self._remove(lost, force)
        await self._operations.done(wait, [n.id for n in self.node.catalogue.all()])
        return ids

    def _find(self, ref: str) -> str:
        """The id of a node that is known, was removed, or owns addresses."""
        node = self.node
        named = [n for n in node.nodes.values() if n.name == ref.lower()]
        # A host that was set up anew bears the name of the one that was lost.
        gone = [n.id for n in named if n.id != node.me and not node.is_alive(n.id)]
        if len(gone) == 1 or (len(named) == 1 and len(gone) < 2):
            return gone[0] if gone else named[0].id
        if gone:
            raise Invalid(f"node {ref}", f"is any of {', '.join(sorted(gone))}", "Give the id")
        removed = [r.node for r in node.removals.values() if r.name == ref.lower()]
        if not named and removed:
            return removed[-1]
        if named:
            return named[0].id
        owners = {owner for a in node.addresses.values() for owner in a.owners()}
        known = set(node.nodes) | set(node.removals) | owners
        found = [id for id in known if ref and id.startswith(ref)]
        if len(found) != 1:
            if found:
                raise Invalid(f"node {ref}", f"is any of {', '.join(sorted(found))}", "Give more")
            raise NotFound(f"node {shorten(ref)}", "does not exist", "See 'vxmesh node ls'")
        return found[0]

    async def _until_unlinked(self, id: str) -> None:
        """Wait for the stream of a node that is gone: it stands a moment after the verdict."""
        deadline = self.node.monotonic() + LINKED_FOR
        while self.node.condition(id).state == "unreachable" and self.node.is_linked(id):
            if self.node.monotonic() >= deadline:
                return
            await asyncio.sleep(POLL)

    def _check_lost(self, id: str, force: bool) -> None:
        name = self.node.node_name(id)
        if id == self.node.me:
            raise InUse(f"node {name}", "is this one", "Run 'vxmesh node leave'")
        if force:
            return
        if self.node.is_alive(id):
            fix = f"Run 'vxmesh node leave' there, {FORCE.format(name=name)}"
            raise InUse(f"node {name}", "is alive", fix)
        status = self.node.status.get(id)
        if status and status.state == "unreachable" and not status.withdrawn:
            raise InUse(
                f"node {name}",
                "has a host that answers, so its workloads may still use its addresses",
                "Start its agent and run 'vxmesh node leave' there, or stop the host, "
                + FORCE.format(name=name),
            )

    async def _remove(self, lost: set[str], force: bool) -> None:
        node = self.node
        # A stamp is higher than all before, those of earlier lives included.
        number = node.hybrid.next(node.clock()) if force else 0
        attempt = node.removing.begin(lost, node.monotonic(), number)
        voters: set[str] = set()
        try:
            await self._gather(attempt, voters)
        except BaseException:
            node.removing.finish(attempt)
            await self._cluster.release(attempt.ask, sorted(voters))
            raise
        if attempt.failed:  # another one goes on with it
            await self._await_rival(attempt.failed.about, lost)

    async def _gather(self, attempt: Attempt, voters: set[str]) -> None:
        """Get every voter's consent and what it knows, and inherit; `voters` are those asked."""
        node, removing = self.node, self.node.removing
        # One that is removed by force is not even asked: nothing it says would count.
        doubted = set() if attempt.ask.force else attempt.ask.lost
        tasks = {id: asyncio.ensure_future(self._ask_lost(id, attempt)) for id in doubted}
        try:
            while not attempt.failed:
                for voter in removing.look(attempt):
                    if voter not in tasks:
                        voters.add(voter)
                        tasks[voter] = asyncio.ensure_future(self._ask(voter, attempt))
                silent = all(tasks[id].done() for id in doubted)
                if silent and removing.is_ready(attempt, node.monotonic()):
                    node.inherit(attempt.ask.lost)
                    removing.finish(attempt)
                    return
                if node.monotonic() >= attempt.deadline:
                    raise self._late(attempt)
                await asyncio.sleep(POLL)
                for task in tasks.values():
                    if task.done():
                        task.result()
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        if attempt.failed.verdict is not Verdict.RIVAL:
            raise self._refusal(attempt.failed, attempt)

    async def _ask(self, voter: str, attempt: Attempt) -> None:
        deadline = self.node.monotonic() + TRY_FOR
        linked_until = self.node.monotonic() + LINKED_FOR  # as seen from there
        while True:
            try:
                answer = await self._cluster.ask(voter, attempt.ask)
            except Unavailable as error:
                if self.node.monotonic() >= deadline:
                    raise self._silent(voter, attempt, error) from None
                await asyncio.sleep(POLL)
            else:
                if answer.verdict is Verdict.ALIVE and self.node.monotonic() < linked_until:
                    await asyncio.sleep(ASK_AGAIN)
                    continue
                if answer.verdict is Verdict.STRANGER:
                    answer = Answer(Verdict.STRANGER, voter)
                self.node.removing.take(attempt, voter, answer)
                return

    async def _ask_lost(self, lost: str, attempt: Attempt) -> None:
        """One that answers is not lost, whatever we believed."""
        try:
            await self._cluster.ask(lost, attempt.ask)
        except Unavailable:
            return
        self.node.removing.take(attempt, lost, Answer(Verdict.ALIVE, lost))

    async def _await_rival(self, rival: str, lost: set[str]) -> None:
        """Another one removes them: what comes of it is this call's outcome too."""
        names = self._names(lost)
        log.info("removal.rival", by=rival, nodes=sorted(lost))
        deadline = self.node.monotonic() + RIVAL_WITHIN
        while not all(self.node.is_removed(id) for id in lost):
            if self.node.monotonic() >= deadline:
                raise Conflict(
                    f"node {names}",
                    f"is being removed by {self.node.node_name(rival)}, which has not finished",
                    "See 'vxmesh node ls', and run it again",
                )
            await asyncio.sleep(POLL)

    # -- errors --

    def _names(self, ids: set[str] | frozenset[str]) -> str:
        return ", ".join(sorted(self.node.node_name(id) for id in ids))

    def _refusal(self, answer: Answer, attempt: Attempt) -> VxmeshError:
        about = self.node.node_name(answer.about)
        if answer.verdict is Verdict.ALIVE:
            return InUse(
                f"node {about}",
                "is alive: it answers, or another node sees it",
                f"Run 'vxmesh node leave' there, {FORCE.format(name=about)}",
            )
        return Unavailable(
            f"node {self._names(attempt.ask.lost)}",
            f"cannot be removed from here: {about} does not know this node yet, or has agreed "
            "to its removal",
            "Try again shortly; see 'vxmesh node ls' there",
        )

    def _silent(self, voter: str, attempt: Attempt, error: Unavailable) -> VxmeshError:
        name = self.node.node_name(voter)
        option = "--force " if attempt.ask.force else ""
        both = " ".join(sorted(self.node.node_name(id) for id in {*attempt.ask.lost, voter}))
        return Unavailable(
            f"node {self._names(attempt.ask.lost)}",
            f"cannot be removed: {name} has to agree, and {error.why}",
            f"Bring {name} back, or remove both: vxmesh node rm {option}{both}",
        )

    def _late(self, attempt: Attempt) -> VxmeshError:
        missing = self.node.removing.look(attempt) or self.node.removing.lacking(attempt)
        return Unavailable(
            f"node {self._names(attempt.ask.lost)}",
            f"cannot be removed: not all that is known about its addresses came within "
            f"{ATTEMPT_WITHIN:g} s (of {self._names(set(missing)) or 'nobody'})",
            "Try again; see 'vxmesh node ls'",
        )

    # -- this node --

    async def leave(self, force: bool = False, wait: float = 0.0) -> list[Handover]:
        """Hand everything over and end the agent; what went to whom.

        InUse names what runs here, unless `force` ends it. Unavailable if a living node does not
        confirm that it has all that this one wrote, Timeout if after `wait` s a node's kernel
        still has something of it: then the agent goes on, and what was handed over is the
        others' all the same.
        """
        node = self.node
        node.check_stays()
        self._check_idle(force)
        node.leaving = True
        try:
            await self._clear()
            living = sorted(id for id in node.voters() if id != node.me and node.is_alive(id))
            done = self._hand_over(living)
            await self._operations.done()
            await asyncio.gather(*(self._cluster.deliver(id) for id in living))
            # Before it goes: afterwards there is nobody who could say that it is not so.
            await self._operations.done(wait, [n.id for n in self.node.catalogue.all()])
        except Timeout as error:
            node.leaving = False
            raise Timeout(
                "this node",
                f"has not left: {error.what} {error.why}",
                "Run it again; without --wait it does not wait for kernels",
            ) from None
        except Unavailable as error:
            node.leaving = False
            raise Unavailable(
                "this node",
                f"cannot leave yet ({error.what} {error.why})",
                error.fix or "Run it again once that node answers, or counts as unreachable",
            ) from None
        except BaseException:
            node.leaving = False
            raise
        # Shielded: a caller who goes away now must not leave an agent neither here nor gone.
        await asyncio.shield(asyncio.ensure_future(self._part()))
        return done

    async def _part(self) -> None:
        try:
            await self._announce_left()
            self.node.tell("member.left", "this node left the cluster", node=self.node.me)
        finally:
            self._ended()

    def _check_idle(self, force: bool) -> None:
        node = self.node
        names = [s.name for s in node.sandboxes.values()] + [
            e.name for m in node.members.values() for e in m.local.values() if not e.sandbox
        ]
        if names and not force:
            some = ", ".join(sorted(names)[:LISTED])
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            raise InUse(
                "this node",
                f"has workloads: {some}{more}",
                "Stop them, or end them with 'vxmesh node leave --force'",
            )

    async def _clear(self) -> None:
        """Take everything of this node's away, out of its kernel too."""
        await self._operations.remove_sandboxes(list(self.node.sandboxes))
        local = [id for m in self.node.members.values() for id in m.local]
        committed = [id for id in local if self.node.is_committed(id)]
        await self._operations.remove_endpoints(committed)

    def _hand_over(self, living: Sequence[str]) -> list[Handover]:
        node, done = self.node, []
        owns = [id for id, a in node.addresses.items() if node.me in a.owners()]
        if owns and not living and len(node.voters()) > 1:
            raise Unavailable(
                "this node's addresses",
                "cannot be handed over: no other node answers",
                "Bring one back; or just stop the agent, which keeps them until it is back",
            )
        for id in owns if living else ():
            members = node.members.get(id)
            counts = members.count if members else {}

            def rank(other: str, id: str = id, counts: dict[str, int] = counts) -> tuple[int, str]:
                # Who has most endpoints there; without any, spread (rendezvous hashing).
                mixed = hashlib.blake2s(f"{id} {other}".encode()).hexdigest()
                return -counts.get(other, 0), mixed

            to = min(living, key=rank)
            done.append(Handover(id, to, node.hand_over(id, to)))
        return done
