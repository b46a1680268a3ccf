"""--wait, where something is in a network's way on one host."""

from __future__ import annotations

from tests.netns.world import World


def test_a_device_of_somebody_elses_holds_up_only_the_network_whose_vni_it_has(
    world: World,
) -> None:
    blocked, other = world.network("--vni", "5177"), world.network()
    world.run(
        "h2", "ip", "link", "add", "stranger", "type", "vxlan", "id", "5177", "dstport", "4789",
        "local", world.host("h2").address, check=True,
    )  # fmt: skip
    world.later(lambda: world.run("h2", "ip", "link", "del", "stranger"))
    # An endpoint without an interface: nobody waits for its port, and the network is to be here.
    own = world.try_vx("h2", "endpoint", "create", "--network", blocked, "--name", "a", "--wait=6")
    assert own.returncode == 1
    assert "not in this node's kernel after 6 s (VNI 5177 is taken by" in own.stderr, own.stderr
    world.vx("h2", "endpoint", "create", "--network", other, "--name", "b", "--wait=10")

    for host in ("h1", "h3"):
        world.vx(host, "endpoint", "create", "--network", other, "--name", host, "--wait=10")
        late = world.try_vx(
            host, "endpoint", "create", "--network", blocked, "--name", f"{host}x", "--wait=4"
        )
        assert late.returncode == 1
        assert "not in the kernel of h2 (VNI 5177 is taken by device stranger" in late.stderr
    rows = set(world.fdb("h2", world.vni(other)))
    assert len(rows) == 2, "what does not concern it is there"

    world.run("h2", "ip", "link", "del", "stranger", check=True)
    world.vx("h1", "endpoint", "create", "--network", blocked, "--name", "last", "--wait=45")
    assert len(world.fdb("h2", world.vni(blocked))) == 3
