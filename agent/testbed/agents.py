"""The agents of a testbed: starting them in their hosts and knowing when they serve.

Opposite: processes.py starts and ends any process; bed.py says which agents there should be.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent import syscalls
from agent.errors import NoAgent, Timeout, VxmeshError
from agent.testbed import processes
from agent.testbed.namespaces import Namespaces

if TYPE_CHECKING:
    from agent.client import Client

SOCKET = "unix:///run/vxmesh/agent.sock"  # as a host itself calls it
POLL = 0.05  # seconds
START_TIMEOUT = 45.0  # seconds for all that start at once, and for each of them
START_TIMEOUT_EACH = 3.0  # more: they share the machine's cores
TAIL = 15  # lines of a log in an error
PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])  # where `python -m agent` finds itself


@dataclass(frozen=True, slots=True)
class Started:
    """An agent that was started; `log_offset` is where in its log it begins."""

    host: str
    pid: int
    start_time: int
    socket: Path  # as seen from outside the host
    log: Path
    log_offset: int
    join: str = ""  # what it was told, to join the others


def start(
    host: str,
    namespaces: Namespaces,
    address: str,
    join: str,
    join_token: str,
    options: Sequence[str],
    token: str,
    socket_path: Path,
    log: Path,
) -> Started:
    """Start an agent. Settings of the caller's environment (VXMESH_…) do not reach it."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("VXMESH_")}
    command = [sys.executable, "-m", "agent", "agent", "--name", host, "--advertise", address]
    joining = ["--join", join] if join else []
    joining += ["--token", join_token] if join_token else []
    offset = log.stat().st_size if log.exists() else 0
    pid = processes.spawn(
        namespaces,
        [*command, *joining, *options],
        processes.environment(base, host, token, SOCKET),
        PACKAGE_ROOT,
        log,
    )
    started = syscalls.start_time(pid)
    return Started(host, pid, started, socket_path, log, offset, " ".join(joining))


def answers(path: Path) -> bool:
    """Whether somebody accepts connections on that unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True


def wait_ready(agents: Sequence[Started]) -> None:
    """Return when each accepts connections. VxmeshError with its log if one ends before."""
    left = list(agents)
    deadline = time.monotonic() + START_TIMEOUT + START_TIMEOUT_EACH * len(left)
    while left:
        for agent in list(left):
            if not processes.is_running(agent.pid, agent.start_time):
                raise VxmeshError(
                    f"the agent of {agent.host}",
                    "ended while it started",
                    tail(agent),
                )
            if answers(agent.socket):
                left.remove(agent)
        if left and time.monotonic() > deadline:
            raise Timeout(
                f"the agent of {left[0].host}",
                "does not open its socket",
                tail(left[0]),
            )
        if left:
            time.sleep(POLL)


def tail(agent: Started) -> str:
    """The end of what it said since it was started, for an error."""
    with agent.log.open("rb") as file:
        file.seek(agent.log_offset)
        lines = file.read().decode(errors="replace").splitlines()
    if not lines:
        return f"Its log, {agent.log}, says nothing"
    return "\n".join([f"Its log, {agent.log}, ends so:", *(f"  {x}" for x in lines[-TAIL:])])


def wait_joined(sockets: Mapping[str, Path], seconds: float) -> None:
    """Return when each agent says that every other is alive. Timeout says who lacks whom."""
    from agent.clientunix import finish

    deadline = time.monotonic() + seconds
    for host, path in sockets.items():
        while missing := sorted(set(sockets) - finish(_seen_by(path))):
            if time.monotonic() > deadline:
                raise Timeout(
                    f"the agent of {host}",
                    f"does not see {', '.join(missing)}",
                    "See its log: 'vxmesh testbed status' says where",
                )
            time.sleep(POLL)


def prepare() -> None:
    """Load the client, which takes longest of what is needed here, while agents start."""
    import agent.clientunix  # noqa: F401


def read_token(path: Path) -> str:
    """The token to join the cluster of the agent at that socket."""
    from agent.clientunix import finish

    async def ask() -> str:
        async with _client(path) as client:
            return (await client.join_token()).token

    return finish(ask())


async def _seen_by(path: Path) -> set[str]:
    """The nodes that an agent says are alive; none while it is busy starting."""
    async with _client(path) as client:
        try:
            return {n.name for n in await client.nodes() if n.state == "alive"}
        except NoAgent:
            return set()


def _client(path: Path) -> Client:
    from agent.client import Client

    return Client(f"unix://{path}", blocks=True)
