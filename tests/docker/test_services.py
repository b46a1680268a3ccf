"""Services whose backends are containers of several engines."""

from __future__ import annotations

from agent.testbed.engines import IMAGE
from tests.docker.world import DockerWorld

SERVE = "hostname > /var/www/index.html; httpd -f -v -h /var/www"


def server(world: DockerWorld, host: str, name: str, *options: str) -> None:
    world.docker(
        host, "run", "-d", "--network", "web", "--name", name, "--hostname", name,
        "--stop-timeout", "0", *options, IMAGE, "sh", "-c", SERVE,
    )  # fmt: skip


def network(world: DockerWorld) -> None:
    world.docker("h1", "network", "create", "-d", "vxmesh", "web")
    world.wait(lambda: all("web" in world.networks(h) for h in ("h2", "h3")), "web is everywhere")


def answers(world: DockerWorld, url: str, count: int = 12) -> set[str]:
    """Who answers the client, outside, a number of times; "" if nobody does."""
    return set(world.fetched(url, count))


def test_containers_of_two_hosts_behind_one_address_and_one_port(world: DockerWorld) -> None:
    network(world)
    for host, name in (("h2", "one"), ("h3", "two")):
        server(world, host, name, "--label", "app=api")
    world.container("h1", "web", "asks")
    world.vx(
        "h1", "service", "create", "api", "--network", "web", "--port", "80",
        "--publish", "8088:80", "--selector", "app=api", "--wait=10",
    )  # fmt: skip
    url = f"http://{world.host('h1').address}:8088/"
    world.wait(lambda: answers(world, url) == {"one", "two"}, "both answer at h1's port")
    client = world.bed.client.address
    for host, name in (("h2", "one"), ("h3", "two")):
        world.logged(host, name, client)  # the client's own address
    ask = "for i in $(seq 30); do printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 10 api 80; done"
    seen = world.docker("h1", "exec", "asks", "sh", "-c", ask)
    assert "\none" in seen and "\ntwo" in seen  # one of two is missed in 1 of 10^9 times
    world.docker("h3", "rm", "-f", "two")
    world.wait(lambda: answers(world, url) == {"one"}, "who is left answers alone")


def test_a_healthcheck_is_our_health(world: DockerWorld) -> None:
    network(world)
    server(
        world, "h2", "one", "--health-cmd", "test -e /ok", "--health-interval", "1s",
        "--health-retries", "1",
    )  # fmt: skip

    def health() -> str:
        return str(world.read("h1", "endpoint", "inspect", "one")["health"])

    world.wait(lambda: "one" in world.vx("h1", "endpoint", "ls"), "it is known")
    world.wait(lambda: health() == "unhealthy", "it is not healthy yet")
    world.docker("h2", "exec", "one", "touch", "/ok")
    world.wait(lambda: health() == "healthy", "it is healthy")
    world.docker("h2", "exec", "one", "rm", "/ok")
    world.wait(lambda: health() == "unhealthy", "it is not any more")


def test_labels_alone_make_a_service_across_hosts(world: DockerWorld) -> None:
    network(world)
    labels = ("--label", "vxmesh.service=api", "--label", "vxmesh.publish=8089:80")
    for host, name in (("h2", "one"), ("h3", "two")):
        server(world, host, name, *labels)
    url = f"http://{world.host('h1').address}:8089/"
    world.wait(lambda: answers(world, url) == {"one", "two"}, "both answer at h1's port")
    assert [s["name"] for s in world.read("h1", "service", "ls")] == ["api"]
    client = world.bed.client.address
    world.logged("h3", "two", client)
    for host, name in (("h2", "one"), ("h3", "two")):
        world.docker(host, "rm", "-f", name)
    world.wait(lambda: world.read("h1", "service", "ls") == [], "it is gone")
