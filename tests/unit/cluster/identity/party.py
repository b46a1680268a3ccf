"""Nodes with identities in one process: real files, real TLS on loopback, no kernel."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from agent.cluster.identity.administration import Administration
from agent.cluster.identity.establish import Wish, establish
from agent.cluster.identity.files import Files
from agent.cluster.identity.service import Identity
from agent.cluster.identity.tokens import Token, parse
from agent.cluster.peers import Peers
from agent.model import Node, Notice
from agent.node import NodeState
from agent.views import Change, Status
from tests.directories import run_dir
from tests.ports import free_port

WITHIN = 60.0  # s; a machine may be busy


async def until(check: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WITHIN
    while not check():
        assert time.monotonic() < deadline, f"not within {WITHIN:.0f} s: {what}"
        await asyncio.sleep(0.02)


class Guest:
    """A node. It believes of others what its streams say; `run` starts it."""

    def __init__(self, directory: Path, name: str, life: float = 3600.0) -> None:
        self.directory, self.name, self.life = directory / name, name, life
        self.files = Files(self.directory)
        self.id = secrets.token_hex(8)
        self.port = free_port()
        self.run_dir = run_dir()
        self.notices: list[Notice] = []
        self.started = False

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def enrol(self, seeds: list[str], token: Token | None) -> None:
        """Get an identity; VxmeshError if there is none to be had."""
        wish = Wish(self.id, self.name, seeds, token, self.life, within=1.0)
        self.held = await establish(self.files, wish)

    async def run(self, seeds: list[str], token: Token | None = None) -> Guest:
        await self.enrol(seeds, token)
        self.identity = Identity(self.files, self.held, self.life)
        node = Node(self.id, self.name, "127.0.0.1", self.port, "127.0.0.1", 4789, "t", 0.0, 1500)
        me = self.identity.describe(node)
        self.state = NodeState(me, time.time, random.Random(self.id))
        self.identity.attach(self.state)
        self.peers = Peers(
            self.state,
            me,
            secrets.token_hex(4),
            self._durable,
            self.identity.keyring,
            self.run_dir,
            enrol=self.identity.desk.handlers(),
        )
        self.peers.on_link.append(self._linked)
        self.state.listeners.append(self._changed)
        self.state.describe(me)
        self.started = True
        await self.peers.start(seeds)
        await self.identity.start()
        self.admin = Administration(self.identity, self._spread)
        return self

    async def stop(self) -> None:
        if self.started:
            self.started = False
            await self.identity.stop()
            await self.peers.stop()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    async def token(self, rotate: bool = False) -> Token:
        return parse((await self.admin.join_token(rotate)).token)

    def told(self, kind: str) -> list[Notice]:
        return [n for n in self.notices if n.kind == kind]

    def lose(self, other: Guest) -> None:
        """Let another node count as gone."""
        self.state.set_status(other.id, Status("unreachable", "silent", 0.0, True))

    def knows_all(self, guests: list[Guest]) -> bool:
        return set(self.state.nodes) >= {g.id for g in guests}

    async def _durable(self) -> None:
        pass

    async def _spread(self) -> list[str]:
        return list(await self.peers.wait_applied(self.state.replica.written(), 5.0))

    def _linked(self, node: str) -> None:
        if node in self.peers.links:
            self.state.set_status(node, Status("alive", "", 0.0))

    def _changed(self, change: Change) -> None:
        self.notices += change.notices
        self.state.replica.publish(self.state.replica.written())
        self.state.kernel_has(self.state.versions())
        asyncio.get_running_loop().call_soon(self.peers.wake)


@contextlib.asynccontextmanager
async def party(directory: Path, count: int, life: float = 3600.0) -> AsyncIterator[list[Guest]]:
    """The first founds a cluster, the others join it one after the other by its token."""
    guests = [Guest(directory, f"h{n + 1}", life) for n in range(count)]
    try:
        await guests[0].run([])
        for guest in guests[1:]:
            await guest.run([guests[0].target], await guests[0].token())
        await until(lambda: all(g.knows_all(guests) for g in guests), "all know all")
        yield guests
    finally:
        for guest in guests:
            await guest.stop()
