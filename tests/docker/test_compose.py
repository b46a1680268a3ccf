"""Compose on two hosts: one file, started on each, is one service of all containers."""

from __future__ import annotations

import shutil

import pytest

from agent.testbed import engines
from tests.docker.test_services import answers
from tests.docker.world import COMMAND_TIMEOUT, DockerWorld
from tests.needs import lacks
from tests.netns.world import Failed

COMPOSE = shutil.which("docker-compose", path=engines.PATH)
FILE = """
version: "2.4"
services:
  api:
    image: busybox
    command: sh -c 'hostname > /var/www/index.html; httpd -f -v -h /var/www'
    stop_grace_period: 0s
    labels:
      vxmesh.service: api
      vxmesh.publish: "8091:80"
    networks: [web]
networks:
  web:
    external: true
"""
EACH = 3  # containers on each host


@pytest.fixture(autouse=True)
def _compose() -> None:
    need_compose()


def need_compose() -> None:
    """Skip, or under CI fail, where there is none."""
    if COMPOSE is None:
        lacks("needs docker-compose. Install it with 'apt-get install docker-compose'")


def compose(world: DockerWorld, host: str, *words: str) -> None:
    command = ["docker-compose", "-p", f"on{host}", "-f", "/run/compose.yml", *words]
    done = world.run(host, *command, timeout=2 * COMMAND_TIMEOUT)
    if done.returncode:
        raise Failed(f"{host}: docker-compose {' '.join(words)}: {done.stderr}")


def test_scaled_on_two_hosts_it_is_one_service(world: DockerWorld) -> None:
    world.docker("h1", "network", "create", "-d", "vxmesh", "--ipam-driver", "vxmesh", "web")
    hosts = ("h1", "h3")
    world.wait(lambda: "web" in world.networks("h3"), "web is on h3")
    for host in hosts:
        (world.host(host).run_dir / "compose.yml").write_text(FILE)
        compose(world, host, "up", "-d", "--scale", f"api={EACH}")
    ids = {i for h in hosts for i in world.docker(h, "ps", "-q").split()}
    assert len(ids) == EACH * len(hosts)
    for host in ("h1", "h2"):  # also at a host that has none of them
        url = f"http://{world.host(host).address}:8091/"
        world.wait(lambda url=url: answers(world, url, 40) == ids, f"all answer at {host}")  # type: ignore[misc]
    client = world.bed.client.address
    for host in hosts:
        for id in world.docker(host, "ps", "-q").split():
            world.logged(host, id, client)  # the client's own address
    compose(world, "h3", "up", "-d", "--scale", "api=1")
    gone = ids - {i for h in hosts for i in world.docker(h, "ps", "-q").split()}
    assert len(gone) == EACH - 1
    world.wait(lambda: answers(world, url, 40) == ids - gone, "who is left answers")
    for host in hosts:
        compose(world, host, "down")
    world.wait(lambda: world.read("h1", "service", "ls") == [], "it is gone")
    world.wait(lambda: world.read("h2", "endpoint", "ls") == [], "nothing is left")
