"""The anchor of failures: Docker Swarm's overlay between two hosts on the testbed's wire.

An engine of its own in each host: its files below the host's /run, which is memory and goes with
the host, its cgroups below one that is removed at the end. No image is pulled: one is made out of
a static busybox. What leaves the hosts unanswered (a name that Swarm does not know) is answered
by a name server on the client, as it would be anywhere.
Source: https://docs.docker.com/engine/swarm/. Opposite: mesh.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from agent.syscalls import start_time
from agent.testbed import Host, Testbed, processes
from tests.bench import echo, lookups, world
from tests.bench.lookups import Nowhere, Workload
from tests.bench.observe import Late
from tests.bench.world import Missing

PREFIX = "vxb-swarm"
# Of the distribution's programs: another `docker` may be too new for its engine.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
NETWORK, SUBNET = "bench", "10.64.0.0/16"
IMAGE, SLEEP = "bench", ["/bin/busybox", "sleep", "86400"]
NEAR, FAR = "near", "far"
RESOLVER = "127.0.0.11"  # Docker's, in each container
CGROUP = "vxb-swarm"
CGROUPS = Path("/sys/fs/cgroup")
READY_TIMEOUT = 30.0  # seconds until an engine answers, or a container is reached
STOP_TIMEOUT = 20.0
ATTEMPTS = 3
DATA = "/run/docker-data"  # as the host calls it

ABOUT = '{{.State.Pid}} {{(index .NetworkSettings.Networks "%s").IPAddress}}'


class Engine:
    """dockerd of one host."""

    def __init__(self, host: Host, dockerd: str) -> None:
        self.host = host
        self._command = [dockerd, "--data-root", DATA, "--pidfile", "/run/docker.pid"]
        self._command += ["--cgroup-parent", f"/{CGROUP}"]
        self._log = host.directory / "dockerd.log"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers. Late with the end of its log if it does not."""
        self._wait_for_containerd()
        with self._log.open("ab") as log:
            self.process = self.host.popen(
                self._command,
                env={"PATH": PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_TIMEOUT
        while self.host.run(["docker", "version"], env={"PATH": PATH}).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Late(f"dockerd of {self.host.name} does not answer: {self.last_words()}")
            time.sleep(0.1)

    def stop(self, number: signal.Signals) -> None:
        """Send it a signal that ends it, and wait until it has ended."""
        self.process.send_signal(number)
        self.process.wait(STOP_TIMEOUT)

    def docker(self, *words: str) -> str:
        """A command to it; its stdout."""
        done = self.host.run(
            ["docker", *words], check=True, timeout=world.TIMEOUT, env={"PATH": PATH}
        )
        return done.stdout.strip()

    def _wait_for_containerd(self) -> None:
        """Return when that of the last dockerd runs or is gone altogether. It dies with dockerd,
        but while nobody has reaped it the next dockerd takes it for a living one and gives up."""
        deadline = time.monotonic() + STOP_TIMEOUT
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = int((self.host.run_dir / "docker/containerd/containerd.pid").read_text())
            while Path(f"/proc/{pid}").exists() and start_time(pid) == 0:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-world.LOG_TAIL :])


class Swarm:
    """Two engines in a swarm, an attachable overlay network, a container on each."""

    def __init__(self, bed: Testbed, engines: list[Engine]) -> None:
        self.bed = bed
        self._engines = engines
        h1, h2 = engines
        h1.docker("swarm", "init", "--advertise-addr", h1.host.address)
        token = h1.docker("swarm", "join-token", "-q", "worker")
        join = ["swarm", "join", "--token", token, "--advertise-addr", h2.host.address]
        h2.docker(*join, f"{h1.host.address}:2377")
        overlay = ["network", "create", "-d", "overlay", "--attachable", "--subnet", SUBNET]
        h1.docker(*overlay, NETWORK)
        self.prepare()

    def prepare(self) -> None:
        """Wait until the containers reach each other by name; make anew what has ended, and the
        far one if Swarm does not get over what was done to it."""
        h1, h2 = self._engines
        for attempt in range(ATTEMPTS):
            self.near, self.far = _container(h1, NEAR), _container(h2, FAR)
            if self._is_reached():
                return
            if attempt + 1 < ATTEMPTS:
                h2.docker("rm", "-f", FAR)
        raise Late(f"{FAR} is not reached in Swarm after {ATTEMPTS} times {READY_TIMEOUT:.0f} s")

    def _is_reached(self) -> bool:
        found = lookups.wait(self.near, FAR, READY_TIMEOUT, resolves=True)
        if found is None:
            return False
        with contextlib.closing(echo.Server(self.far)):
            return echo.wait(self.near, found[1], READY_TIMEOUT) is not None

    def restart(self, number: signal.Signals) -> None:
        """End the engine of h2 by a signal and start it again."""
        self._engines[1].stop(number)
        self._engines[1].start()

    @property
    def runs(self) -> bool:
        """Whether the far container still is the one that prepare() found."""
        return start_time(self.far.pid) != 0


@contextlib.contextmanager
def start(directory: Path) -> Iterator[Swarm]:
    """Two hosts with Docker in a swarm; it all goes at the end. Missing if Docker is not here,
    or does not work here."""
    dockerd, docker, busybox = (
        shutil.which(name, path=PATH) for name in ("dockerd", "docker", "busybox")
    )
    if dockerd is None or docker is None or busybox is None:
        raise Missing(
            "Docker and busybox are not here. Install them with "
            "'apt-get install docker.io busybox-static'"
        )
    image = make_image(Path(busybox), directory)
    with contextlib.ExitStack() as stack:
        stack.callback(remove_cgroups)
        bed = stack.enter_context(world.temporary_bed(PREFIX, with_agents=False))
        stack.callback(Nowhere(bed.client.netns).close)
        try:
            engines: list[Engine] = []
            for host in bed.hosts:
                engines.append(Engine(host, dockerd))
                stack.callback(end, engines[-1])
                engines[-1].docker("import", str(image), IMAGE)
            swarm = Swarm(bed, engines)
        except (Late, subprocess.SubprocessError) as error:
            notes = "; ".join([str(error), *getattr(error, "__notes__", ())])
            raise Missing(f"Docker Swarm does not work here: {notes}") from error
        yield swarm


def _container(engine: Engine, name: str) -> Workload:
    """A container of that name, made anew if it does not run."""
    token = engine.host.environment()[processes.TOKEN_VARIABLE]
    running = engine.docker("ps", "-q", "--filter", f"name=^{name}$")
    if not running:
        with contextlib.suppress(subprocess.CalledProcessError):
            engine.docker("rm", "-f", name)
        # The token is for the testbed, which ends whatever has it: a container outlives a
        # dockerd that is killed.
        command = ["run", "-d", "--name", name, "--network", NETWORK, "--stop-timeout", "0"]
        engine.docker(*command, "-e", f"{processes.TOKEN_VARIABLE}={token}", IMAGE, *SLEEP)
    pid, address = engine.docker("inspect", "-f", ABOUT % NETWORK, name).split()
    return Workload(int(pid), name, address, RESOLVER)


def make_image(busybox: Path, directory: Path) -> Path:
    """An image's files as a tar archive: busybox alone."""
    path = directory / "image.tar"
    with tarfile.open(path, "w") as tar:
        data = busybox.read_bytes()
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(data), 0o755
        tar.addfile(entry, io.BytesIO(data))
    return path


def end(engine: Engine) -> None:
    """Stop an engine, which ends its containers and its containerd; what it does not end the
    testbed does."""
    if engine.process.poll() is None:
        with contextlib.suppress(subprocess.SubprocessError):
            ids = engine.docker("ps", "-aq").split()
            if ids:
                engine.docker("rm", "-f", *ids)
        world.end(engine.process, STOP_TIMEOUT)


def remove_cgroups() -> None:
    """Remove what engines made below CGROUP, in every hierarchy; innermost first, cgroups(7)."""
    for top in (CGROUPS / CGROUP, *CGROUPS.glob(f"*/{CGROUP}")):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()
