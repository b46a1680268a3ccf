"""Bridge networks on the real kernel: one node's own, with a way out and published ports."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable

from tests.netns.world import World


def _answers(ask: Callable[[], subprocess.CompletedProcess[str]], with_: str) -> bool:
    return ask().stdout.strip() == with_


def test_a_bridge_is_on_the_node_that_made_it_alone(world: World) -> None:
    net, other = world.network("--driver", "bridge"), world.network()
    one, two = world.workload("h1", net), world.workload("h1", net)
    apart = world.workload("h1", other)
    assert world.reaches("h1", one, world.read("h1", "network", "inspect", net)["gateways"][0])
    assert world.reaches("h1", one, world.host("client").address)
    assert world.reaches("h1", one, two), "by name"
    assert not world.pings("h1", one, world.address("h1", apart, other))
    assert f"vxl{world.vni(net)}" not in world.links("h1")
    refused = world.try_vx("h2", "run", "--network", net, "-o", "json", "--", "true")
    assert refused.returncode
    assert "is a bridge on h1" in json.loads(refused.stderr)["error"]["message"]


def test_a_bridges_ports_are_published_one_by_one_and_in_ranges(world: World) -> None:
    net = world.network("--driver", "bridge")
    h1, client = world.host("h1").address, world.host("client").address
    told = "import http.server as h\nclass S(h.SimpleHTTPRequestHandler):\n def do_GET(s):\n"
    told += "  s.send_response(200); s.end_headers(); s.wfile.write(s.client_address[0].encode())\n"
    told += "h.ThreadingHTTPServer(('', 81), S).serve_forever()"
    published = ("--publish", "18080-18082:80-82", "--publish", f"{h1}:18090:81")
    sandbox = f"{net}-web"
    world.vx(
        "h1", "run", "--network", net, "--name", sandbox, *published, "-d", "--",
        "python3", "-c", told,
    )  # fmt: skip
    world.later(lambda: world.try_vx("h1", "endpoint", "rm", sandbox))
    asks = (
        "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).read().decode())"
    )
    fetch = ("python3", "-c", asks)
    for port in (18081, 18090):
        ask = functools.partial(world.run, "client", *fetch, f"http://{h1}:{port}/")
        world.wait(functools.partial(_answers, ask, client), f"client is seen itself at {port}")
    assert world.run("h1", *fetch, f"http://{h1}:18081/").stdout, "from the host itself"
    assert world.inside("h1", sandbox, *fetch, f"http://{h1}:18081/").stdout, "hairpin"
    assert world.run("client", *fetch, f"http://{h1}:18080/").returncode, "nobody listens there"


def test_an_internal_bridge_has_no_way_out(world: World) -> None:
    net = world.network("--driver", "bridge", "--internal")
    one, two = world.workload("h1", net), world.workload("h1", net)
    assert world.reaches("h1", one, two)
    assert not world.pings("h1", one, world.host("client").address)


def test_what_a_bridge_cannot_be_is_refused(world: World) -> None:
    for words in (("--encrypted",), ("--vni", "77")):
        refused = world.try_vx("h1", "network", "create", "nobridge", "--driver", "bridge", *words)
        assert refused.returncode == 2, refused.stderr
        assert "bridge" in refused.stderr
    net = world.network("--driver", "bridge")
    refused = world.try_vx("h1", "service", "create", "web", "--network", net, "--port", "80")
    assert refused.returncode and "bridge" in refused.stderr
