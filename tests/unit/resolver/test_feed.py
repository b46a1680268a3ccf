"""resolver/feed.py, client.py and intake.py: the feed, within one process and across two."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from agent.core.names import Kind, Names
from agent.core.question import A, parse_question
from agent.errors import Invalid, Unavailable
from agent.model import Endpoint, Network
from agent.notation import parse_address
from agent.resolver import client as client_module
from agent.resolver import feed
from agent.resolver.client import ResolverClient
from agent.resolver.feed import Batch, State, View
from agent.resolver.forward import Forwarder
from agent.resolver.intake import Intake, _apply
from agent.resolver.server import Server
from agent.syscalls import start_time
from tests.ports import free_port

NET, BACK = "d" * 16, "b" * 16


def network(id: str = NET, name: str = "demo", **options: Any) -> Network:
    made = Network(
        id=id,
        name=name,
        driver="overlay",
        subnets=("10.0.0.0/8",) if id == NET else ("192.168.0.0/16",),
        gateways=(),
        ip_range="",
        vni=4097,
        mtu=0,
        internal=False,
        encrypted=False,
        options={},
        labels={},
        created=0.0,
        creator="",
    )
    return msgspec.structs.replace(made, **options)


def endpoint(number: int, name: str = "", of: str = NET, aliases: tuple[str, ...] = ()) -> Endpoint:
    address = bytes((10 if of == NET else 192, number >> 16, number >> 8 & 255, number & 255))
    return Endpoint(
        f"{number:016x}", of, name or f"n{number}", b"\2" + bytes(5), (address,), aliases
    )


def state(count: int, name: str = "n") -> State:
    return State(
        [network()],
        [endpoint(number, f"{name}{number}") for number in range(count)],
        [View(parse_address("127.0.0.2"), (NET,))],
    )


async def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    for _ in range(int(seconds / 0.01)):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not come to hold in time")


class Resolver:
    """The resolver's half in this process, without DNS sockets, as the client finds it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.server = Server([], [], Forwarder(Path("/nonexistent"), lambda _a, _p: False))
        self.stopped = asyncio.Event()
        self.intake: Intake | None = None
        self.setup = feed.setup_of((), None)

    @property
    def names(self) -> Names:
        return self.server.names

    async def start(self) -> None:
        path = self.run_dir / feed.SOCKET
        forwarder = self.server._forwarder
        self.intake = Intake(path, self.setup, self.server, forwarder, self.stopped.set)
        await self.intake.start()

    async def end(self) -> None:
        if self.intake is not None:
            await self.intake.close()
            self.intake = None

    def knows(self, text: str) -> bool:
        return self.names.answer(parse_question(text, A), (NET,)).kind is Kind.ANSWER


@pytest_asyncio.fixture
async def resolver(tmp_path: Path) -> AsyncIterator[Resolver]:
    made = Resolver(tmp_path)
    await made.start()
    yield made
    await made.end()


@pytest.fixture
def no_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts a process in these tests fails."""

    def refuse(*_args: object) -> None:
        raise OSError("no process in this test")

    monkeypatch.setattr(client_module, "spawn", refuse)


Make = Callable[..., Coroutine[Any, Any, ResolverClient]]


@pytest_asyncio.fixture
async def make_client(tmp_path: Path, no_spawn: None) -> AsyncIterator[Make]:
    made: list[ResolverClient] = []

    async def make(snapshot: Callable[[], State]) -> ResolverClient:
        client = ResolverClient(tmp_path, None, snapshot)
        made.append(client)
        await client.connect_or_spawn()
        return client

    yield make
    for client in made:
        await client.close()


async def test_the_first_state_then_changes(resolver: Resolver, make_client: Make) -> None:
    client = await make_client(lambda: state(3))
    assert client.pid == os.getpid()
    assert resolver.names.counts() == {"networks": 1, "endpoints": 3, "services": 0, "views": 1}
    assert resolver.names.view(parse_address("127.0.0.2")) == (NET,)
    batch = Batch()
    batch.put(endpoint(7, "seven"))
    batch.drop(NET, f"{0:016x}")
    batch.put_view(parse_address("10.0.0.9"), (NET, BACK))
    batch.drop_view(parse_address("127.0.0.2"))
    client.send(batch)
    await client.flush()
    assert resolver.knows("seven")
    assert not resolver.knows("n0")
    assert resolver.names.view(parse_address("10.0.0.9")) == (NET, BACK)
    assert resolver.names.view(parse_address("127.0.0.2")) == ()


async def test_send_takes_no_hold_of_the_batch(resolver: Resolver, make_client: Make) -> None:
    client = await make_client(lambda: state(0))
    batch = Batch()
    batch.put(endpoint(1))
    client.send(batch)
    batch.drop(NET, f"{1:016x}")
    await client.flush()
    assert resolver.knows("n1")


async def test_a_new_state_replaces_the_stale_all_at_once(
    resolver: Resolver, make_client: Make
) -> None:
    """Until the commit the old names resolve, all of them; after it none does."""
    client = await make_client(lambda: state(2500, "old"))
    replacing = asyncio.create_task(client.replace(state(5000, "new")))
    seen: set[tuple[bool, bool, bool, bool]] = set()
    while not replacing.done():
        seen.add(tuple(map(resolver.knows, ("old0", "old2499", "new0", "new4999"))))  # type: ignore[arg-type]
        await asyncio.sleep(0)
    await replacing
    assert seen <= {(True, True, False, False), (False, False, True, True)}
    assert (True, True, False, False) in seen
    assert resolver.knows("new4999")
    assert not resolver.knows("old0")
    assert resolver.names.counts()["endpoints"] == 5000


async def test_changes_during_a_replacement_are_in_force_after_it(
    resolver: Resolver, make_client: Make
) -> None:
    client = await make_client(lambda: state(0))
    replacing = asyncio.create_task(client.replace(state(5000)))
    for number in range(50):
        await asyncio.sleep(0)
        batch = Batch()
        batch.drop(NET, f"{number:016x}")
        batch.put(endpoint(number + 9000))
        client.send(batch)
    await replacing
    await client.flush()
    assert resolver.names.counts()["endpoints"] == 5000
    assert not any(resolver.knows(f"n{number}") for number in range(50))
    assert all(resolver.knows(f"n{number + 9000}") for number in range(50))


async def test_feeding_leaves_the_loop_to_others(resolver: Resolver, make_client: Make) -> None:
    """Both halves run in this loop, so the bound is twice as strict as the agent needs it."""
    client = await make_client(lambda: state(0))
    whole = state(20_000)
    loop = asyncio.get_running_loop()
    steps = 0

    async def others() -> None:
        nonlocal steps
        while True:
            await asyncio.sleep(0)
            steps += 1

    beside = asyncio.create_task(others())
    started = loop.time()
    await client.replace(whole)
    beside.cancel()
    assert steps >= 20
    print(f"20,000 names: {loop.time() - started:.3f} s, {steps} turns for others")


async def test_a_lost_connection_is_made_again_and_fed_the_newest(
    resolver: Resolver, make_client: Make
) -> None:
    wanted = state(2, "old")
    client = await make_client(lambda: wanted)
    await resolver.end()
    assert resolver.knows("old1")  # what is known stays known
    await until(lambda: client.pid == 0)
    wanted = state(3, "new")
    batch = Batch()
    batch.put(endpoint(2, "new2"))
    client.send(batch)  # nobody is there to take it: the next snapshot has it
    with pytest.raises(Unavailable):
        await client.query("old1")
    await resolver.start()
    async with asyncio.timeout(30):
        await client.flush()
    assert client.pid == os.getpid()
    assert resolver.knows("new2")
    assert not resolver.knows("old0")


async def test_who_lags_too_far_is_fed_anew(
    resolver: Resolver, make_client: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0

    def snapshot() -> State:
        nonlocal taken
        taken += 1
        return state(300)

    client = await make_client(snapshot)
    monkeypatch.setattr(client_module, "PENDING_ROWS_MAX", 100)
    for number in range(300):
        batch = Batch()
        batch.put(endpoint(number))
        client.send(batch)
    assert len(client._pending) <= 100
    await client.flush()
    assert taken == 2
    assert resolver.names.counts()["endpoints"] == 300


async def test_a_snapshot_that_fails_is_tried_again(resolver: Resolver, make_client: Make) -> None:
    fails = [True, True]

    def snapshot() -> State:
        if fails:
            fails.pop()
            raise RuntimeError("not now")
        return state(1)

    await make_client(snapshot)
    assert resolver.knows("n0")


async def test_queries(resolver: Resolver, make_client: Make) -> None:
    client = await make_client(lambda: state(3))
    verdict = await client.query("n1.demo", networks=(NET,))
    assert (verdict.kind, verdict.records) == ("answer", ("A 10.0.0.1",))
    assert any("endpoint 0000000000000001" in line for line in verdict.why)
    asked = await client.query("n1", address=parse_address("127.0.0.2"))
    assert asked.records == ("A 10.0.0.1",)
    reverse = await client.query("10.0.0.2", "PTR", networks=(NET,))
    assert reverse.records == ("PTR n2.demo.vxmesh.internal.",)
    assert (await client.query("n1", address=parse_address("9.9.9.9"))).kind == "nxdomain"
    assert (await client.query("n1.demo", "MX", networks=(NET,))).kind == "nodata"
    foreign = await client.query("example.com", networks=(NET,))
    assert foreign.kind == "forward"
    assert "no resolver of the host gave an answer (SERVFAIL)" in foreign.why
    for name, type in (("a..b", "A"), ("one", "NONSENSE"), ("one", "AXFR"), ("", "A")):
        with pytest.raises(Invalid):
            await client.query(name, type, networks=(NET,))


async def test_stats(resolver: Resolver, make_client: Make) -> None:
    client = await make_client(lambda: state(3))
    stats = await client.stats()
    assert stats.pid == os.getpid()
    assert stats.counters["endpoints"] == 3


async def test_only_the_last_feeder_may_change_anything(
    resolver: Resolver, make_client: Make
) -> None:
    old = await make_client(lambda: state(1, "old"))
    await make_client(lambda: state(1, "new"))
    old._snapshot = lambda: state(1, "again")
    batch = Batch()
    batch.put(endpoint(5, "stale"))
    old.send(batch)
    # The old one is cut off and, as it lives, feeds its whole state and so takes over.
    async with asyncio.timeout(30):
        await old.flush()
    assert resolver.knows("again0")
    assert not resolver.knows("stale")


async def _exchange(resolver: Resolver, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(resolver.run_dir / feed.SOCKET))
    writer.write(sent)
    writer.write_eof()
    async with asyncio.timeout(30):
        received = await reader.read()
    writer.close()
    return received


HELLO = bytes(feed.frame(feed.Hello(feed.PROTOCOL, feed.setup_of((), None))))


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\5short",
        bytes(feed.frame(feed.Reset())),  # before any hello
        HELLO + b"\0\0\0\1\xc1",
        HELLO + b"\0\0\0\3\x91\x01\x02",
        HELLO + bytes(feed.frame(feed.Commit(1))),
        HELLO + bytes(feed.frame(feed.Changes(endpoints=[endpoint(1, "evil")]))),  # no reset
        HELLO + bytes(feed.frame(feed.Reset())),  # a state that never ends
        HELLO
        + bytes(feed.frame(feed.Reset()))
        + bytes(feed.frame(feed.Changes(networks=[network(subnets=("nonsense",))]))),
    ],
)
async def test_garbage_on_the_feed_changes_nothing(
    resolver: Resolver, make_client: Make, sent: bytes
) -> None:
    await make_client(lambda: state(2))
    await _exchange(resolver, sent)
    assert resolver.knows("n1")
    assert not resolver.knows("evil")
    assert resolver.names.counts()["endpoints"] == 2
    assert not resolver.stopped.is_set()


@pytest.mark.parametrize(
    "hello", [feed.Hello(feed.PROTOCOL + 1, ""), feed.Hello(feed.PROTOCOL, "other setup")]
)
async def test_another_protocol_or_setup_ends_it_after_telling(
    resolver: Resolver, hello: feed.Hello
) -> None:
    if hello.protocol != feed.PROTOCOL:
        hello = msgspec.structs.replace(hello, setup=resolver.setup)
    received = await _exchange(resolver, bytes(feed.frame(hello)))
    welcome = feed.to_agent_decoder.decode(received[4:])
    assert isinstance(welcome, feed.Welcome)
    assert (welcome.accepted, welcome.protocol, welcome.pid) == (False, feed.PROTOCOL, os.getpid())
    assert resolver.stopped.is_set()


def test_the_socket_is_only_for_its_owner(tmp_path: Path) -> None:
    async def mode() -> int:
        made = Resolver(tmp_path)
        await made.start()
        found = (tmp_path / feed.SOCKET).stat().st_mode & 0o777
        await made.end()
        return found

    assert asyncio.run(mode()) == 0o600
    assert not (tmp_path / feed.SOCKET).exists()


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from([NET, BACK]), st.integers(1, 3)),
        st.tuples(st.just("drop"), st.sampled_from([NET, BACK]), st.integers(1, 3)),
        st.tuples(st.just("put_network"), st.sampled_from([NET, BACK]), st.integers(1, 2)),
        st.tuples(st.just("drop_network"), st.sampled_from([NET, BACK]), st.just(0)),
        st.tuples(st.just("put_view"), st.sampled_from([NET, BACK]), st.integers(1, 3)),
        st.tuples(st.just("drop_view"), st.just(NET), st.integers(1, 3)),
    ),
    max_size=25,
)


def _step(target: Names | Batch, kind: str, of: str, number: int, salt: int) -> None:
    row = endpoint(number, f"n{number}-{salt % 2}", of, ("all",))
    view = bytes((10, 0, 0, number))
    if kind == "put" and isinstance(target, Batch):
        target.put(row)
    elif kind == "put" and isinstance(target, Names):
        target.put(of, row.id, row.name, row.aliases, row.addresses)
    elif kind == "drop":
        target.drop(of, row.id)
    elif kind == "put_network" and isinstance(target, Batch):
        target.put_network(network(of, f"net{number}"))
    elif kind == "put_network" and isinstance(target, Names):
        target.put_network(of, f"net{number}", network(of).subnets)
    elif kind == "drop_network":
        target.drop_network(of)
    elif kind == "put_view":
        target.put_view(view, (of,))
    elif kind == "drop_view":
        target.drop_view(view)


def _known(names: Names) -> list[Any]:
    """All that can be asked, answered."""
    found: list[Any] = [names.counts()]
    for view in ((NET,), (BACK,)):
        for name in ("all", *(f"n{n}-{s}" for n in (1, 2, 3) for s in (0, 1))):
            found.append(names.answer(parse_question(name, A), view))
            for other in ("net1", "net2"):
                found.append(names.answer(parse_question(f"{name}.{other}", A), view))
    found.extend(names.view(bytes((10, 0, 0, n))) for n in (1, 2, 3))
    return found


@given(_STEPS, st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_coalesced_changes_lead_where_each_by_itself_would(
    steps: list[tuple[str, str, int]], cuts: list[int]
) -> None:
    """Batches merged, split into messages, encoded and decoded: the same names as one by one."""
    plain, fed = Names(), Names()
    pending, batch = Batch(), Batch()
    for salt, (kind, of, number) in enumerate(steps):
        _step(plain, kind, of, number, salt)
        _step(batch, kind, of, number, salt)
        if salt % cuts[salt % len(cuts)] == 0:
            pending.merge(batch)
            batch = Batch()
    pending.merge(batch)
    for changes in pending.changes():
        decoded = feed.to_resolver_decoder.decode(bytes(feed.frame(changes))[4:])
        assert isinstance(decoded, feed.Changes)
        _apply(decoded, fed)
    assert _known(fed) == _known(plain)


def test_a_large_batch_goes_in_pieces() -> None:
    batch = Batch()
    for number in range(2 * feed.ROWS_PER_FRAME + 1):
        batch.put(endpoint(number))
    sizes = [len(changes.endpoints) for changes in batch.changes()]
    assert sizes == [feed.ROWS_PER_FRAME, feed.ROWS_PER_FRAME, 1]
    assert len(batch) == sum(sizes)


# From here on the real process, on a port of its own in this namespace.


@pytest.fixture
def listen() -> str:
    """Where nobody listens, nor will."""
    return f"127.0.0.1:{free_port()}"


@pytest_asyncio.fixture
async def spawned(tmp_path: Path, listen: str) -> AsyncIterator[ResolverClient]:
    client = ResolverClient(tmp_path, None, lambda: state(10), [listen])
    await client.connect_or_spawn()
    yield client
    await client.stop()


async def test_it_is_started_found_again_and_stopped(
    spawned: ResolverClient, tmp_path: Path, listen: str
) -> None:
    pid = spawned.pid
    assert pid not in (0, os.getpid())
    assert os.getsid(pid) == pid
    assert (tmp_path / feed.LOCK).read_text() == f"{pid}\n"
    await spawned.close()
    second = ResolverClient(tmp_path, None, lambda: state(20), [listen])
    await second.connect_or_spawn()
    assert second.pid == pid
    assert (await second.stats()).counters["endpoints"] == 20
    await second.stop()
    assert start_time(pid) == 0
    assert not (tmp_path / feed.SOCKET).exists()
    await second.stop()


async def test_killed_it_is_started_again_and_fed(spawned: ResolverClient) -> None:
    pid = spawned.pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: spawned.pid not in (0, pid))
    async with asyncio.timeout(30):
        await spawned.flush()
    assert (await spawned.query("n9", networks=(NET,))).kind == "answer"


async def test_another_setup_replaces_the_process(
    spawned: ResolverClient, tmp_path: Path, listen: str
) -> None:
    pid = spawned.pid
    await spawned.close()
    other = ResolverClient(tmp_path, None, lambda: state(1), [listen, "127.0.0.2:0"])
    await other.connect_or_spawn()
    assert other.pid != pid
    await until(lambda: start_time(pid) == 0)  # it answers until the new one can
    assert (tmp_path / feed.SOCKET).exists(), "which is the new one's"
    await other.stop()


async def test_a_port_that_is_taken_is_told(
    spawned: ResolverClient, tmp_path: Path, listen: str
) -> None:
    other_dir = tmp_path / "other"
    other_dir.mkdir()
    other = ResolverClient(other_dir, None, lambda: state(1), [listen])
    with pytest.raises(Unavailable, match="the port is taken"):
        await other.connect_or_spawn()


async def test_a_run_dir_or_namespace_that_is_not_there(tmp_path: Path) -> None:
    for client in (
        ResolverClient(tmp_path / "none", None, lambda: state(1)),
        ResolverClient(tmp_path, str(tmp_path / "none"), lambda: state(1)),
    ):
        with pytest.raises(Unavailable):
            await client.connect_or_spawn()
        await client.stop()


async def test_two_never_run_for_one_run_dir(
    spawned: ResolverClient, tmp_path: Path, listen: str
) -> None:
    command = [sys.executable, "-m", "agent.resolver", "--run-dir", str(tmp_path)]
    second = await asyncio.to_thread(
        subprocess.run, [*command, "--listen", "127.0.0.3:0"], capture_output=True, text=True
    )
    assert second.returncode == feed.EXIT_LOCKED
    assert f"process {spawned.pid} is one already" in second.stderr
    assert (await spawned.query("n9", networks=(NET,))).kind == "answer"


async def test_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agent.resolver",
        "--run-dir",
        str(tmp_path),
        "--listen",
        "127.0.0.3:0",
        stderr=asyncio.subprocess.PIPE,
    )
    await until((tmp_path / feed.SOCKET).exists)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        _, errors = await process.communicate()
    assert process.returncode == 0
    lines = [msgspec.json.decode(line) for line in errors.splitlines()]
    assert [line["event"] for line in lines] == ["listening", "ended"]
    assert {"time", "level", "logger", "event"} <= lines[0].keys()
    assert not (tmp_path / feed.SOCKET).exists()


def test_it_imports_only_what_it_needs() -> None:
    """It starts whenever it was lost, and then names wait for it."""
    script = (
        "import sys, agent.resolver.process\n"
        "print([m for m in ('grpc', 'pyroute2', 'structlog', 'aiohttp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
