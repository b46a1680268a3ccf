"""An agent of another build comes: its name server takes over, and no question goes unanswered."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import pytest

from agent.core.names import ZONE
from agent.model import Endpoint, Network
from agent.notation import parse_address
from agent.resolver import feed
from agent.resolver.client import ResolverClient
from agent.resolver.feed import State, View
from tests.ports import free_port

NET = "a" * 16
OLDER = """
import sys, agent
agent.__version__ = "0.0.1"
from agent.resolver import process
process.HANDOVER_SECONDS = 0.0  # its heir takes longer to start, as on a machine that is busy
sys.exit(process.main())
"""


def state() -> State:
    network = Network(
        NET, "net", "overlay", ("10.1.0.0/24",), (), "", 1, 0, False, False, {}, {}, 0.0, ""
    )
    one = Endpoint("1" * 16, NET, "one", b"\2" + bytes(5), (parse_address("10.1.0.2"),))
    return State([network], [one], [View(parse_address("127.0.0.1"), (NET,))])


class Asker(threading.Thread):
    """Asks for one name over and over, as a sandbox would."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.answered = 0
        self.failures: list[str] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            question = dns.message.make_query(f"one.net.{ZONE}.", "A")
            try:
                reply = dns.query.udp(question, "127.0.0.1", port=self.port, timeout=20.0)
                if reply.rcode() != dns.rcode.NOERROR or not reply.answer:
                    self.failures.append(dns.rcode.to_text(reply.rcode()))
                self.answered += 1
            except Exception as error:
                self.failures.append(repr(error))


async def test_names_resolve_across_an_upgrade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    listen = f"127.0.0.1:{port}"
    command = [sys.executable, "-c", OLDER, "--run-dir", str(tmp_path), "--listen", listen]
    older = subprocess.Popen(command)  # noqa: ASYNC220
    asker = Asker(port)
    try:
        async with asyncio.timeout(60):
            while not (tmp_path / feed.SOCKET).exists():
                await asyncio.sleep(0.02)
        ours = feed.setup_of([listen], None)
        with monkeypatch.context() as patch:
            patch.setattr(feed, "setup_of", lambda *_: "0.0.1" + ours[ours.index(" ") :])
            before = ResolverClient(tmp_path, None, state, [listen])
            await before.connect_or_spawn()
            assert before.pid == older.pid
            await before.close()
        asker.start()
        after = ResolverClient(tmp_path, None, state, [listen])
        await after.connect_or_spawn()
        assert after.pid != older.pid
        assert await asyncio.to_thread(older.wait, 60) == 0
        seen = asker.answered
        async with asyncio.timeout(60):
            while asker.answered < seen + 100:  # the new one answers by itself
                await asyncio.sleep(0.02)
        asker.done.set()
        await asyncio.to_thread(asker.join)  # before there is nobody to answer it any more
        await after.stop()
    finally:
        asker.done.set()
        if older.poll() is None:
            older.kill()
            older.wait()
    assert asker.answered > 100 and not asker.failures, asker.failures
