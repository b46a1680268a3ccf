"""What tests do with the engines of a testbed: the netns tier's words, and `docker`."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
from typing import Any

from agent.testbed.engines import IMAGE, SOCKET
from tests.netns.world import Failed, World

COMMAND_TIMEOUT = 180.0  # s; two cores have three engines to run, and more tests beside them
# A connection each, as curl makes them: argv is the URL, how many, and for how long to wait.
FETCH = """
import json, sys, urllib.request
def fetch():
    within = float(sys.argv[3])
    try:
        return urllib.request.urlopen(sys.argv[1], timeout=within).read().decode().strip()
    except OSError:
        return ""
print(json.dumps([fetch() for _ in range(int(sys.argv[2]))]))
"""
ANSWERED = 3  # s; for a connection, of which one is made after the other, and tried again
FOREVER = ["sleep", "3600"]


class DockerWorld(World):
    """A testbed with engines, and what a test made on it."""

    def try_docker(self, host: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(host, "docker", *words, timeout=COMMAND_TIMEOUT)

    def docker(self, host: str, *words: str) -> str:
        """A command to a host's engine; its stdout. Failed if it fails."""
        done = self.try_docker(host, *words)
        if done.returncode:
            raise Failed(f"{host}: docker {' '.join(words)}: {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def api(self, host: str, method: str, path: str, body: object = None) -> Any:
        """A request to a host's engine, without a docker command for it; what it answers."""
        connection = http.client.HTTPConnection("docker", timeout=COMMAND_TIMEOUT)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(COMMAND_TIMEOUT)
        connection.sock.connect(str(self.host(host).run_dir / SOCKET))
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        if answer.status >= 400:
            raise Failed(f"{host}: {method} {path}: {answer.status}: {text}")
        return json.loads(text) if text else None

    def container(self, host: str, network: str, name: str, *options: str) -> str:
        """A container that sleeps; its name."""
        more = ["--stop-timeout", "0", *options, IMAGE, *FOREVER]
        self.docker(host, "run", "-d", "--network", network, "--name", name, *more)
        return name

    def known(self, host: str, *names: str) -> None:
        """Wait until a host knows containers by name, which comes with their engine's events."""
        self.wait(
            lambda: {*names} <= {e["name"] for e in self.read(host, "endpoint", "ls")},
            f"{host} knows {', '.join(names)}",
        )

    def logged(self, host: str, container: str, text: str) -> None:
        """Wait until a container's log, which its engine writes, has a text."""

        def has() -> bool:
            log = self.run(host, "docker", "logs", container)
            return text in log.stdout + log.stderr

        self.wait(has, f"{container} of {host} has logged {text}")

    def fetched(self, url: str, count: int = 1) -> list[str]:
        """What the client, outside, gets from there, a number of times; "" where nobody answers."""
        command = [sys.executable, "-c", FETCH, url, str(count), str(ANSWERED)]
        done = self.bed.client.run(command, timeout=COMMAND_TIMEOUT + ANSWERED * count)
        return list(json.loads(done.stdout))

    def clean(self) -> None:
        """Take away containers and networks, then what the rest of a test made."""
        for host in self.bed.hosts:
            if not (host.is_running and host.is_engine_running):
                self.bed.start(host.name)
            ids = self.docker(host.name, "ps", "-aq").split()
            if ids:
                self.docker(host.name, "rm", "-f", *ids)
        for host in self.bed.hosts:
            for id in self.networks(host.name).values():
                # Another host's removal may come before ours.
                self.try_docker(host.name, "network", "rm", id)
        super().clean()

    def networks(self, host: str) -> dict[str, str]:
        """The engine's networks of ours: name -> id."""
        listed = self.docker(
            host, "network", "ls", "--no-trunc", "--filter", "driver=vxmesh",
            "--format", "{{.Name}} {{.ID}}",
        )  # fmt: skip
        return dict(line.split() for line in listed.splitlines())

    def about(self, host: str, container: str, network: str) -> dict[str, Any]:
        """What the engine says of a container in a network."""
        text = self.docker(host, "inspect", "-f", "{{json .NetworkSettings.Networks}}", container)
        found: dict[str, Any] = json.loads(text)[network]
        return found
