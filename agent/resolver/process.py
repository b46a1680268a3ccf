"""The name server's process, which `python -m agent.resolver` is.

Opens its sockets in the namespace of ours and waits for an agent to feed it. It ends on
SIGTERM or SIGINT, when an agent says so, or shortly after an agent of another build or setup
has come, which starts its own beside it; not when the agent ends. Logs are JSON lines on stderr:
time, level, logger, event and fields.
What stands opposite: launch.py, which starts it.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from agent.errors import Conflict, VxmeshError
from agent.resolver import feed
from agent.resolver.forward import Forwarder
from agent.resolver.intake import Intake
from agent.resolver.server import Server
from agent.resolver.sockets import (
    DEFAULT_LISTEN,
    Listen,
    is_ours,
    open_sockets,
    parse_listen,
    share,
)
from agent.resolver.workers import Sockets, Workers
from agent.syscalls import raise_file_limit

LOCK_SECONDS = 3.0  # the one before may be about to end
# Answers from what was known are better than none, for as long as a start and a first feed take.
HANDOVER_SECONDS = 2.0
HEIR_SECONDS = 30.0  # more, as long as no other one listens; a start takes 0.3
_POLL_SECONDS = 0.02

_log = logging.getLogger("vxmesh.resolver")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Locked(Conflict):
    """Another resolver has the run-dir; the agent tells this from a taken port."""

    exit_status = feed.EXIT_LOCKED


def _lock(run_dir: Path) -> int:
    """The lock of this run-dir, with our pid in it, held until the process ends.

    Raises _Locked if another resolver holds it.
    """
    path = run_dir / feed.LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                os.close(fd)
                raise _Locked(
                    f"name server of {run_dir}",
                    f"process {holder or '?'} is one already",
                    "End it first, or use another --run-dir",
                ) from None
            time.sleep(_POLL_SECONDS)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _forwarder(args: argparse.Namespace, listens: list[Listen]) -> Forwarder:
    netns: str | None = args.netns
    return Forwarder(
        Path(args.resolv_conf), lambda address, port: is_ours(address, port, listens, netns)
    )


def _setup(args: argparse.Namespace) -> str:
    return feed.setup_of(tuple(args.listen or ()), args.netns, args.workers)


def _run(args: argparse.Namespace, lock: int) -> None:
    """Open the sockets, make the other processes, and serve."""
    listens = [parse_listen(text) for text in args.listen or DEFAULT_LISTEN]
    several = args.workers > 1
    first = open_sockets(listens, args.netns, optional=not args.listen, shared=several)
    chosen = [Listen(*sock.getsockname()[:2]) for sock in first[0]]
    others = [open_sockets(chosen, args.netns, shared=True) for _ in range(args.workers - 1)]
    workers = Workers()

    def work(sock: socket.socket, sockets: Sockets) -> None:
        os.close(lock)  # it is the first process's alone
        for each in (first, *others):
            if each is not sockets:
                for other in (*each[0], *each[1]):
                    other.close()
        asyncio.run(_work(args, listens, sock, sockets))

    workers.fork(others, work)
    asyncio.run(_serve(args, lock, listens, first, workers))


async def _work(
    args: argparse.Namespace, listens: list[Listen], sock: socket.socket, sockets: Sockets
) -> None:
    """One of the other processes: until the first ends or says so."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    forwarder = _forwarder(args, listens)
    server = Server(*sockets, forwarder)
    intake = Intake(Path(args.run_dir), _setup(args), server, forwarder, lambda: None)
    await intake.serve(sock)
    intake.leave()
    await server.close()


async def _serve(
    args: argparse.Namespace,
    lock: int,
    listens: list[Listen],
    sockets: Sockets,
    workers: Workers,
) -> None:
    udp, tcp = sockets
    forwarder = _forwarder(args, listens)
    server = Server(udp, tcp, forwarder)
    adopting: set[asyncio.Task[None]] = set()

    def adopt(left: Sockets) -> None:
        task = asyncio.get_running_loop().create_task(server.adopt(*left))
        adopting.add(task)
        task.add_done_callback(adopting.discard)

    workers.adopt = adopt
    stop = asyncio.Event()
    setup = _setup(args)
    await workers.start(setup)
    loop = asyncio.get_running_loop()
    replaced = asyncio.Event()
    path = Path(args.run_dir) / feed.SOCKET
    intake = Intake(path, setup, server, forwarder, stop.set, replaced.set, workers)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await intake.start()
    addresses = [str(sock.getsockname()[:2]) for sock in udp]
    _log.info("listening", extra={"fields": {"pid": os.getpid(), "addresses": addresses}})
    giving_way = asyncio.create_task(_give_way(replaced, intake, server, lock, stop, workers))
    await stop.wait()
    giving_way.cancel()
    await intake.close()
    intake.leave()
    await workers.close()
    await server.close()
    _log.info("ended", extra={"fields": dict(server.counters)})


async def _give_way(
    replaced: asyncio.Event,
    intake: Intake,
    server: Server,
    lock: int,
    stop: asyncio.Event,
    workers: Workers,
) -> None:
    """Once an agent of another build has come: go on answering while it starts its own."""
    await replaced.wait()
    await intake.close()
    server.share()
    share(workers.sockets())
    fcntl.flock(lock, fcntl.LOCK_UN)
    await asyncio.sleep(HANDOVER_SECONDS)
    # A machine that is busy starts its heir later than that, and then nobody would answer.
    polls = int(HEIR_SECONDS / _POLL_SECONDS)
    while polls and not intake.path.exists():
        await asyncio.sleep(_POLL_SECONDS)
        polls -= 1
    stop.set()


def main() -> int:
    """Run it; the exit status is that of the error classes, feed.EXIT_LOCKED if one runs."""
    parser = argparse.ArgumentParser(prog="python -m agent.resolver", description=__doc__)
    parser.add_argument("--run-dir", required=True, help="where its socket and lock are")
    parser.add_argument("--netns", help="path of the network namespace to listen in")
    parser.add_argument(
        "--listen", action="append", help="ADDRESS:PORT, again and again; port 53 of all addresses"
    )
    parser.add_argument("--workers", type=int, default=1, help="how many processes answer")
    parser.add_argument("--resolv-conf", default="/etc/resolv.conf", help="whom to forward to")
    args = parser.parse_args()
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    raise_file_limit()  # each sandbox on a wire costs three
    try:
        lock = _lock(Path(args.run_dir))
        try:
            _run(args, lock)
        finally:
            os.close(lock)
    except VxmeshError as error:
        sys.stderr.write(f"vxmesh: {error}\n")
        return error.exit_status
    except OSError as error:
        sys.stderr.write(f"vxmesh: name server: {error}\n")
        return 1
    return 0
