"""Change without harm: what clients of a published port see while its backends come, go and die.

wrk and clients of our own ask from `client`, which is no node, by h1's port; the backends are on
all hosts. How long a failure lasts is measured by tests/bench/serving.py, never asserted here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.netns.asker import KEPT, NEW, Account, Asker
from tests.netns.test_services import Backend, ready
from tests.netns.world import VXMESH, World, said
from tests.netns.wrk import Load

pytestmark = pytest.mark.netns

SERVER = Path(__file__).with_name("keepalive.py")
PORT = 8480
LEAST = (
    50  # requests for each backend that was replaced: of a busy machine, some hundred times that
)
TIMEOUT = 12.0  # s for a request, its connection included: longer than anything is to hang
WINDOW, ENOUGH = 1.0, 300  # s, and requests, of which some reach each of four backends
WINDOWS = 20  # until one is to be without a failure
HOSTS = ("h3", "h1", "h3", "h2")  # of the backends; the new one of each is on the next host


class Served(Backend):
    """A backend that ends as it should: the requests that it has are answered first."""

    def start(self, server: str = "") -> None:
        words = [VXMESH, "exec", self.name, "--", "python", str(SERVER), self.name]
        pipe = subprocess.PIPE
        self.process = self.world.host(self.host).popen(words, text=True, stdout=pipe)
        self.pid = int(said(self.process.stdout))
        self.world.later(self.stop)

    def finish(self) -> int:
        """Have it end by itself; how many requests it has answered."""
        assert self.process
        os.kill(self.pid, signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, out
        self.process = None
        return int(out.split()[-1])


def serve(world: World, net: str, *more: str) -> list[Served]:
    """Four backends of the service `web`, published on every node, that take connections."""
    made = []
    for number, host in enumerate(HOSTS):
        made.append(Served(world, host, net, f"old{number}", "--label", "app=web"))
        made[-1].start()
    world.vx(
        "h1", "service", "create", "web", "--network", net, "--port", "80:8000",
        "--selector", "app=web", "--health", "http:/", "--health-interval", "0.5",
        "--publish", f"{PORT}:80", *more, "--wait=10",
    )  # fmt: skip
    for host in ("h1", "h2", "h3"):
        world.wait(lambda h=host: len(ready(world, h, "web")) == len(made), "all are healthy")  # type: ignore[misc]
    return made


def url(world: World, host: str = "h1") -> str:
    return f"http://{world.host(host).address}:{PORT}/"


@pytest.mark.parametrize("keep_alive", [True, False], ids=["kept alive", "a connection each"])
def test_all_backends_are_replaced_without_a_failed_request(world: World, keep_alive: bool) -> None:
    net = world.network("--subnet", "10.73.0.0/24")
    old = serve(world, net)
    new: list[Served] = []
    answered = 0
    with Load(world.bed.client, url(world), keep_alive=keep_alive) as load:
        for number, (one, host) in enumerate(zip(old, HOSTS[1:] + HOSTS[:1], strict=True)):
            # As docs/services.md says: first the new one, then no new connections for the old
            # one, then it ends by itself, and only then it goes.
            new.append(Served(world, host, net, f"new{number}", "--label", "app=web"))
            new[-1].start()
            world.wait(lambda: new[-1].name in ready(world, "h1", "web"), "the new one is healthy")
            world.vx("h1", "service", "backend", "drain", "web", one.name, "--wait=10")
            answered += one.finish()
            world.vx(one.host, "sandbox", "rm", one.name, "--wait=10")
        done = load.end()
    names = {backend.name for backend in new}
    world.wait(lambda: ready(world, "h3", "web") == names, "h3 knows it too")
    by_new = [backend.finish() for backend in new]
    print(f"\n{done.requests} requests, {done.failed} failed; by the new ones {by_new}", end="")
    assert done.failed == 0, done.text
    assert done.requests >= LEAST * len(old), done.text
    assert answered + sum(by_new) >= done.requests, "all of them came to our servers"
    assert sum(by_new) >= LEAST
    if not keep_alive:  # kept alive, where few connections go when another one ends is chance
        assert min(by_new) >= LEAST, "each new one had its share"


def window(world: World) -> Account:
    """What becomes of a second's requests, or of more if they are too few."""
    asker = Asker(world.bed.client.popen, url(world), TIMEOUT, ENOUGH)
    world.later(asker.kill)
    time.sleep(WINDOW)
    return asker.end()


def until_all_answer(world: World, made: list[Served]) -> None:
    """Window after window, until each backend has its share of one."""
    names = {one.name for one in made}
    world.wait(lambda: set(window(world).answers) == names, "each of them answers")


def until_none_fails(world: World) -> None:
    """Window after window, until in one nothing fails; then nothing does in the next one either."""
    for _ in range(WINDOWS):
        if not window(world).failures:
            break
    else:
        raise AssertionError(f"requests fail in {WINDOWS} windows of {WINDOW:g} s")
    assert window(world).failures == []


def report(account: Account, since: float) -> None:
    """For people who look (pytest -s)."""
    for kind in (KEPT, NEW):
        failed = [f.ended - since for f in account.failures if f.kind == kind]
        text = f"{len(failed)} failed, the last at {max(failed):.2f} s" if failed else "none failed"
        print(f"\n{kind}: {text}", end="")
    print(f"; slowest answer {account.slowest:.2f} s", end="")


def test_when_a_backends_host_is_cut_off_failures_stop(world: World) -> None:
    net = world.network("--subnet", "10.74.0.0/24")
    made = serve(world, net)
    lost = {one.name for one in made if one.host == "h3"}
    asker = Asker(world.bed.client.popen, url(world), TIMEOUT)
    world.later(asker.kill)
    until_all_answer(world, made)
    world.bed.cut("h3")
    cut = time.monotonic()
    until_none_fails(world)
    through = asker.end()
    assert not set(window(world).answers) & lost
    # Those that were under way there are told so, and do not hang until their own patience ends.
    told = [f for f in through.failures if f.kind == KEPT]  # half of 16 connections, by chance
    assert told and {f.why for f in told} <= {"ConnectionResetError", "IncompleteReadError"}, told
    report(through, cut)


def test_when_a_backend_dies_no_new_connection_fails_after_a_look_at_it(world: World) -> None:
    net = world.network("--subnet", "10.75.0.0/24")
    made = serve(world, net)
    asker = Asker(world.bed.client.popen, url(world), TIMEOUT)
    world.later(asker.kill)
    until_all_answer(world, made)
    killed = time.monotonic()
    made[0].stop()
    until_none_fails(world)
    through = asker.end()
    # Who kept a connection to it lost that one only, and at once.
    report(through, killed)
    assert all(f.why != "TimeoutError" for f in through.failures), through.failures
