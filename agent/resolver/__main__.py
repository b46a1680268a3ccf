"""`python -m agent.resolver`: the name server's process.

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
import sys
import time
from pathlib import Path

from agent.errors import Conflict, VxmeshError
from agent.resolver import feed
from agent.resolver.forward import Forwarder
from agent.resolver.intake import Intake
from agent.resolver.server import Server
from agent.resolver.sockets import DEFAULT_LISTEN, is_ours, open_sockets, parse_listen

LOCK_SECONDS = 3.0  # the one before may be about to end
# Answers from what was known are better than none, for as long as a start and a first feed take.
HANDOVER_SECONDS = 2.0
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


async def _serve(args: argparse.Namespace, lock: int) -> None:
    given: tuple[str, ...] = tuple(args.listen or ())
    listens = [parse_listen(text) for text in given or DEFAULT_LISTEN]
    udp, tcp = open_sockets(listens, args.netns, optional=not given)
    netns: str | None = args.netns
    forwarder = Forwarder(
        Path(args.resolv_conf), lambda address, port: is_ours(address, port, listens, netns)
    )
    server = Server(udp, tcp, forwarder)
    stop = asyncio.Event()
    setup = feed.setup_of(given, netns)
    loop = asyncio.get_running_loop()
    replaced = asyncio.Event()
    path = Path(args.run_dir) / feed.SOCKET
    intake = Intake(path, setup, server, forwarder, stop.set, replaced.set)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await intake.start()
    addresses = [str(sock.getsockname()[:2]) for sock in udp]
    _log.info("listening", extra={"fields": {"pid": os.getpid(), "addresses": addresses}})
    giving_way = asyncio.create_task(_give_way(replaced, intake, server, lock, stop))
    await stop.wait()
    giving_way.cancel()
    await intake.close()
    await server.close()
    _log.info("ended", extra={"fields": dict(server.counters)})


async def _give_way(
    replaced: asyncio.Event, intake: Intake, server: Server, lock: int, stop: asyncio.Event
) -> None:
    """Once an agent of another build has come: go on answering while it starts its own."""
    await replaced.wait()
    await intake.close()
    server.share()
    fcntl.flock(lock, fcntl.LOCK_UN)
    await asyncio.sleep(HANDOVER_SECONDS)
    stop.set()


def main() -> int:
    """Run it; the exit status is that of the error classes, feed.EXIT_LOCKED if one runs."""
    parser = argparse.ArgumentParser(prog="python -m agent.resolver", description=__doc__)
    parser.add_argument("--run-dir", required=True, help="where its socket and lock are")
    parser.add_argument("--netns", help="path of the network namespace to listen in")
    parser.add_argument(
        "--listen", action="append", help="ADDRESS:PORT, again and again; port 53 of all addresses"
    )
    parser.add_argument("--resolv-conf", default="/etc/resolv.conf", help="whom to forward to")
    args = parser.parse_args()
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        lock = _lock(Path(args.run_dir))
        try:
            asyncio.run(_serve(args, lock))
        finally:
            os.close(lock)
    except VxmeshError as error:
        sys.stderr.write(f"vxmesh: {error}\n")
        return error.exit_status
    except OSError as error:
        sys.stderr.write(f"vxmesh: name server: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
