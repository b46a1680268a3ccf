"""The second anchor of names: Docker's own resolver, 127.0.0.11 in each container.

One engine in one host of a testbed, a network of its bridge driver in which one container has all
the names as aliases, and another one that asks: dnsperf runs in that one's network namespace, so
the questions take the way that a container's do. The engine's files and its end are as in
swarm.py. Opposite: names.py, which asks ours with the same dnsperf.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from agent.syscalls import start_time
from agent.testbed import processes
from tests.bench import lookups, swarm, world
from tests.bench.lookups import Nowhere, Workload
from tests.bench.observe import Late
from tests.bench.world import Missing

PREFIX = "vxb-dns"
NETWORK = "names"
ALIASES = 250  # names of one container: a command line and an engine have their bounds


class DockerNames:
    """A container that asks, and what it asks for."""

    def __init__(self, asker: Workload, questions: Path) -> None:
        self.asker, self.questions = asker, questions

    def command(self) -> list[str]:
        """What to run dnsperf with, to be in the container's network namespace."""
        return ["nsenter", f"--net={self.asker.netns}"]

    @property
    def runs(self) -> bool:
        """Whether the container still does."""
        return start_time(self.asker.pid) != 0


@contextlib.contextmanager
def start(directory: Path, count: int) -> Iterator[DockerNames]:
    """An engine whose containers have `count` names; all goes at the end. Missing if Docker is
    not here, or does not work here."""
    paths = [shutil.which(name, path=swarm.PATH) for name in ("dockerd", "docker", "busybox")]
    dockerd, _, busybox = paths
    if dockerd is None or busybox is None or None in paths:
        raise Missing(
            "Docker and busybox are not here. Install them with "
            "'apt-get install docker.io busybox-static'"
        )
    image = swarm.make_image(Path(busybox), directory)
    with contextlib.ExitStack() as stack:
        stack.callback(swarm.remove_cgroups)
        bed = stack.enter_context(world.temporary_bed(PREFIX, with_agents=False, hosts=1))
        stack.callback(Nowhere(bed.client.netns).close)
        try:
            engine = swarm.Engine(bed.hosts[0], dockerd)
            stack.callback(swarm.end, engine)
            engine.docker("import", str(image), swarm.IMAGE)
            engine.docker("network", "create", "-d", "bridge", NETWORK)
            names = [f"n{number}" for number in range(count)]
            for first in range(0, count, ALIASES):
                aliases = names[first : first + ALIASES]
                _container(engine, f"has-{first}", aliases)
            asker = _container(engine, "asks", [])
            if lookups.wait(asker, names[-1], swarm.READY_TIMEOUT, resolves=True) is None:
                raise Late(f"{names[-1]} is not answered by Docker's resolver")
        except (Late, subprocess.SubprocessError) as error:
            notes = "; ".join([str(error), *getattr(error, "__notes__", ())])
            raise Missing(f"Docker does not work here: {notes}") from error
        questions = directory / "questions-docker"
        questions.write_text("".join(f"{name} A\n" for name in names))
        yield DockerNames(asker, questions)


def _container(engine: swarm.Engine, name: str, aliases: list[str]) -> Workload:
    token = engine.host.environment()[processes.TOKEN_VARIABLE]
    words = ["run", "-d", "--name", name, "--network", NETWORK, "--stop-timeout", "0"]
    words += [word for alias in aliases for word in ("--network-alias", alias)]
    # The token is for the testbed, which ends whatever has it.
    words += ["-e", f"{processes.TOKEN_VARIABLE}={token}"]
    engine.docker(*words, swarm.IMAGE, *swarm.SLEEP)
    pid, address = engine.docker("inspect", "-f", swarm.ABOUT % NETWORK, name).split()
    return Workload(int(pid), name, address, swarm.RESOLVER)
