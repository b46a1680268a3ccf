"""A host of a testbed as an object: where it is, and commands and functions run in it.

Opposite: bed.py, which makes the hosts; namespaces.py and processes.py, which it stands on.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from agent.errors import VxmeshError
from agent.testbed import agents, processes, state
from agent.testbed.fabric import CLIENT, Fabric, address6_of, address_of
from agent.testbed.namespaces import Namespaces
from agent.testbed.state import HostState

CANNOT_RUN = 126  # exit statuses, as sh has them
NOT_FOUND = 127
BIN = "/run/docker-bin"  # of a host: the client of its engine is there
DOCKER_HOST = "unix:///run/docker.sock"  # of a host's engine, as it calls it

T = TypeVar("T")


class Host:
    """One host, or the client. A value of the moment: `pid` is the agent's when it was made."""

    def __init__(self, prefix: str, token: str, of: HostState, ipv6: bool) -> None:
        fabric = Fabric(prefix)
        self.name = of.name
        self.namespace = fabric.namespace(of.name)
        self.netns = fabric.netns(of.name)
        self.address = address_of(of.number)
        self.address6 = address6_of(of.number) if ipv6 else ""
        self.namespaces = Namespaces(self.netns, of.mnt)
        self.directory = state.directory_of(prefix) / of.name
        self.run_dir = self.directory / "run"  # what the host calls /run
        self.socket = self.run_dir / "vxmesh/agent.sock"  # as seen from outside
        self.target = "" if of.name == CLIENT else f"unix://{self.socket}"  # for a client's --host
        self.log = self.directory / "agent.log"
        self.pid = of.agent
        self._start_time = of.agent_start
        self.engine = of.engine  # pid of its Docker engine; 0: none
        self._engine_start = of.engine_start
        self.token = token

    @property
    def is_running(self) -> bool:
        """Whether the agent that the testbed started runs, or another one answers."""
        return processes.is_running(self.pid, self._start_time) or agents.answers(self.socket)

    @property
    def is_engine_running(self) -> bool:
        """Whether the Docker engine that the testbed started runs."""
        return processes.is_running(self.engine, self._engine_start)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a command in this host gets: the caller's environment and the way to its agent."""
        own = "" if self.name == CLIENT else agents.SOCKET
        base = {**os.environ, **(extra or {})}
        if self.engine:
            base["DOCKER_HOST"] = DOCKER_HOST
            base["PATH"] = os.pathsep.join([BIN, base.get("PATH", os.defpath)])
        return processes.environment(base, self.name, self.token, own)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in this host, in a throw-away thread. Its sockets stay in the host."""
        return self.namespaces.call(function)

    def popen(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """subprocess.Popen in this host. `env` is added to the environment."""
        return self.call(lambda: subprocess.Popen(command, env=self.environment(env), **options))

    def run(
        self,
        command: Sequence[str],
        *,
        input: str | None = None,
        check: bool = False,
        timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this host to its end and give its output as text.

        With `check`, CalledProcessError with its stderr as a note if it fails;
        subprocess.TimeoutExpired, and the command killed, after `timeout` seconds.
        """
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        pipe = subprocess.PIPE
        with self.popen(
            command, env=env, stdin=stdin, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                out, err = process.communicate(input, timeout)
            except BaseException:
                process.kill()
                raise
        done = subprocess.CompletedProcess(list(command), process.returncode, out, err)
        if check and done.returncode != 0:
            error = subprocess.CalledProcessError(done.returncode, command, out, err)
            error.add_note(f"in {self.name}; stdout: {out!r}; stderr: {err!r}")
            raise error
        return done

    def become(self, command: Sequence[str]) -> NoReturn:
        """Turn this process into a command in this host: stdio, signals and status are its own.

        VxmeshError with the exit status of sh if there is no such command.
        """
        self.namespaces.enter()
        for number in processes.IGNORED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
        environment = self.environment()
        try:
            os.execvpe(command[0], list(command), environment)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            failure = VxmeshError(
                f"command {command[0]}",
                f"cannot be run in {self.name} ({error.strerror})",
                "Give a command that this machine has" if missing else "",
            )
            failure.exit_status = NOT_FOUND if missing else CANNOT_RUN
            raise failure from None
