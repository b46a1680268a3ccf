"""The testbed itself: hosts, wire, cuts and losses, commands in hosts, and that nothing is left.

The agents here are small stand-ins that only open the socket; those of vxmesh have tests of
their own on top of this.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent import syscalls
from agent.errors import Conflict, Invalid, NotFound, Unsupported, VxmeshError
from agent.testbed import (
    Host,
    Testbed,
    agents,
    fabric,
    namespaces,
    processes,
    take_down,
    temporary,
)
from agent.testbed import state as state_file
from agent.testbed.fabric import render
from agent.testbed.namespaces import STATE_DIR, mount_points
from agent.testbed.state import State, directory_of, load, machine_locked, save

pytestmark = pytest.mark.netns


@pytest.fixture
def bed() -> Iterator[Testbed]:
    """Two hosts and a client, without agents."""
    with temporary(2, with_agents=False, ipv6=True) as made:
        yield made


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def reaches(host: Host, address: str, within: float = 1.0) -> bool:
    return host.run(["ping", "-c1", f"-W{within:g}", address]).returncode == 0


def reaches_again(host: Host, address: str) -> bool:
    """The same after a cut: the kernel may be about to give up a question for a MAC, and then
    tells this of packets that came to wait for it too, although the wire works again."""
    wait_for(lambda: reaches(host, address), f"{host.name} reaches {address}")
    return True


def received(host: Host, address: str, count: int = 400) -> float:
    """The share of pings that came back."""
    ping = ["ping", "-q", "-i", "0.002", "-W2", "-c", str(count), address]
    out = host.run(ping, timeout=60).stdout
    match = re.search(r"(\d+) received", out)
    assert match, out
    return int(match[1]) / count


def names(directory: str) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def ip_json(host: Host, *arguments: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(
        host.run(["ip", "-j", *arguments], check=True).stdout or "[]"
    )
    return found


def traces(prefix: str) -> list[str]:
    """Everything of a testbed with that prefix that the machine still shows."""
    ours = re.compile(rf"{prefix}(?!\w)")  # another's may begin with the same digits
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    found = [line for line in names.splitlines() if ours.match(line)]
    found += [line for line in links.splitlines() if re.match(r"(p-|switch)", line)]
    found += [point for point in mount_points() if ours.search(point)]
    found += [str(path) for path in (directory_of(prefix), Path(f"/run/netns/{prefix}-h1"))
              if path.exists()]  # fmt: skip
    return found


# The wire.


def test_hosts_and_client_reach_each_other(bed: Testbed) -> None:
    one, two = bed.hosts
    assert (one.name, one.address, two.address) == ("h1", "10.99.0.1", "10.99.0.2")
    assert (bed.client.address, bed.client.address6) == ("10.99.0.100", "fd99::100")
    assert one.namespace == f"{bed.prefix}-h1"
    for host in (one, bed.client):
        assert reaches(host, two.address, within=10)
        assert reaches(host, two.address6, within=10)


def test_outside_is_the_client(bed: Testbed) -> None:
    bed.client.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"], check=True)
    assert reaches(bed.host("h1"), "192.0.2.1", within=10)


def test_the_wire_carries_1500_bytes_and_no_more(bed: Testbed) -> None:
    ping = ["ping", "-c1", "-W10", "-Mdo", bed.host("h2").address, "-s"]
    assert reaches(bed.host("h1"), bed.host("h2").address, 10)
    assert bed.host("h1").run([*ping, "1472"]).returncode == 0
    assert bed.host("h1").run([*ping, "1473"]).returncode != 0


def test_a_pulled_cable_is_seen_and_healed(bed: Testbed) -> None:
    one = bed.host("h1")
    bed.cut("h1")
    assert not reaches(one, bed.client.address)
    assert not reaches(bed.host("h2"), one.address)
    wait_for(lambda: ip_json(one, "link", "show", "eth0")[0]["operstate"] == "DOWN", "it is seen")
    assert reaches(bed.host("h2"), bed.client.address, within=10)
    assert bed.status()["hosts"][0]["link"] == "down"
    bed.heal("h1")
    assert reaches_again(one, bed.client.address)
    assert reaches_again(one, bed.client.address6)
    assert bed.status()["hosts"][0]["link"] == "up"


def test_a_cut_between_two_leaves_the_others(bed: Testbed) -> None:
    one, two = bed.hosts
    bed.cut("h1", "h2")
    assert not reaches(one, two.address)
    assert not reaches(two, one.address6)
    assert reaches(one, bed.client.address, within=10)
    assert reaches(two, bed.client.address, within=10)
    assert bed.status()["hosts"][1]["cut_from"] == ["h1"]
    bed.heal("h2")
    assert reaches_again(one, two.address)
    assert reaches_again(two, one.address6)


def test_a_one_way_cut_drops_one_direction_only(bed: Testbed) -> None:
    one, two = bed.hosts
    assert reaches(one, two.address, within=10)  # so that no question for a MAC is needed below
    bed.cut("h1", "h2", one_way=True)
    assert not got_datagram(one, two, 0.3)
    assert got_datagram(two, one)
    bed.heal("h1")
    wait_for(lambda: got_datagram(one, two, 0.3), "healed")


def got_datagram(source: Host, target: Host, within: float = 10.0) -> bool:
    """Whether a UDP packet arrives `within` s, whatever happens to answers."""

    def make() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    with target.call(make) as receiver, source.call(make) as sender:
        receiver.bind((target.address, 0))
        receiver.settimeout(within)
        sender.sendto(b"x", receiver.getsockname())
        try:
            return receiver.recv(1) == b"x"
        except TimeoutError:
            return False


def test_loss_is_the_share_given_each_way(bed: Testbed) -> None:
    one, two = bed.hosts
    assert reaches_again(one, two.address) and received(one, two.address) == 1
    bed.loss("h1", 30)
    assert 0.35 < received(one, two.address) < 0.63  # 0.7 × 0.7, and over 5 sigma around it
    assert received(two, bed.client.address) == 1
    bed.loss("h1", 100)
    assert received(one, two.address, 20) == 0
    bed.loss("h1", 0)
    assert reaches_again(one, two.address) and received(one, two.address) == 1
    bed.loss("h1", 100)
    bed.heal("h1")
    assert reaches_again(one, two.address) and received(one, two.address) == 1


def test_cuts_and_losses_add_up(bed: Testbed) -> None:
    bed.loss("h2", 100)
    bed.cut("h1", "client")
    bed.cut("client", "h1")  # again, the other way round: the same cut
    assert not reaches(bed.host("h1"), bed.client.address)
    assert not reaches(bed.host("h2"), bed.client.address)
    bed.heal("h2")
    assert reaches_again(bed.host("h2"), bed.client.address)
    assert not reaches(bed.host("h1"), bed.client.address)


def test_the_ruleset_is_as_written() -> None:
    assert render([("h1", "h2")], {"h3": 0.5}) == (
        "table bridge vxm\n"
        "delete table bridge vxm\n"
        "table bridge vxm {\n"
        "  chain forward {\n"
        "    type filter hook forward priority 0; policy accept;\n"
        '    iifname "p-h1" oifname "p-h2" drop\n'
        '    iifname "p-h3" numgen random mod 10000 < 50 drop\n'
        '    oifname "p-h3" numgen random mod 10000 < 50 drop\n'
        "  }\n"
        "}\n"
    )
    assert render([], {}) == "table bridge vxm\ndelete table bridge vxm\n"


def test_wrong_hosts_and_numbers_change_nothing(bed: Testbed) -> None:
    with pytest.raises(NotFound, match=r"h9: is not in the testbed. Use one of h1, h2, client"):
        bed.cut("h9")
    with pytest.raises(NotFound, match="h9"):
        bed.cut("h1", "h9")
    with pytest.raises(NotFound, match="client: has no agent"):
        bed.kill("client")
    with pytest.raises(Invalid, match="twice"):
        bed.cut("h1", "h1")
    with pytest.raises(Invalid, match="--from"):
        bed.cut("h1", one_way=True)
    for percent in (-1, 100.1, float("nan")):
        with pytest.raises(Invalid, match="out of range"):
            bed.loss("h1", percent)
    assert reaches(bed.host("h1"), bed.host("h2").address, within=10)
    assert bed.status()["hosts"][0]["link"] == "up"


# The files and commands of a host.


def test_a_host_has_its_own_run_and_state_directory(bed: Testbed) -> None:
    one, two = bed.hosts
    one.run(["touch", "/run/mine", f"{STATE_DIR}/mine"], check=True)
    assert two.run(["ls", "/run", STATE_DIR], check=True).stdout.split() == [
        "/run:",
        f"{STATE_DIR}:",
    ]
    assert not Path("/run/mine").exists()
    assert not Path(STATE_DIR, "mine").exists()
    assert (one.run_dir / "mine").exists()
    assert one.run(["cat", "/etc/resolv.conf"], check=True).stdout == "nameserver 10.99.0.100\n"
    assert "10.99.0.100" not in Path("/etc/resolv.conf").read_text()
    # cgroups must stay visible, or no engine runs in a host
    assert one.call(cgroups) == cgroups()


def cgroups() -> dict[str, tuple[int, int]]:
    """What is seen of cgroups: which directory each hierarchy's is, but not what is in it, where
    other tests' engines make and remove some."""
    found = [point for point in mount_points() if f"{point}/".startswith("/sys/fs/cgroup/")]
    stats = {point: Path(point).stat() for point in found}
    return {point: (stat.st_dev, stat.st_ino) for point, stat in stats.items()}


def test_names_of_ip_netns_belong_to_the_host(bed: Testbed) -> None:
    one, two = bed.hosts
    one.run(["ip", "netns", "add", "inner"], check=True)
    assert one.run(["ip", "netns"], check=True).stdout.split() == ["inner"]
    assert two.run(["ip", "netns"], check=True).stdout == ""
    assert "inner" not in names("/run/netns")


def test_hosts_do_not_hold_namespaces_of_the_machine() -> None:
    name = f"vxt-{os.getpid()}-other"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with temporary(1, with_agents=False) as bed:
            seen = bed.host("h1").run(["cat", "/proc/self/mountinfo"], check=True).stdout
            assert name not in seen
            assert "nsfs" not in seen
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def cli(bed: Testbed, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "VXMESH_TESTBED_PREFIX": bed.prefix}
    return subprocess.run(
        [sys.executable, "-m", "agent", "testbed", *arguments],
        text=True, capture_output=True, env=env, timeout=120, **options,
    )  # fmt: skip


def test_exec_is_the_command_itself(bed: Testbed, tmp_path: Path) -> None:
    script = 'read line; echo "$line $VXMESH_HOST $VXMESH_TESTBED"; pwd; echo oops >&2; exit 7'
    done = cli(bed, "exec", "h1", "--", "sh", "-c", script, input="in\n")
    directory = str(Path.cwd())
    assert done.stdout == f"in unix:///run/vxmesh/agent.sock h1\n{directory}\n"
    assert (done.returncode, done.stderr) == (7, "oops\n")
    assert cli(bed, "exec", "h2", "ip", "-4", "-br", "a", "show", "eth0").stdout.split()[2] == (
        "10.99.0.2/24"
    )
    outside = cli(
        bed, "exec", "client", "--", "sh", "-c", "echo ${VXMESH_HOST-unset}; which python"
    )
    assert outside.stdout == f"unset\n{Path(sys.executable).parent}/python\n"


def test_exec_passes_signals_and_what_belongs_to_the_command(bed: Testbed) -> None:
    # Python ignores SIGPIPE, and what it executes would inherit that
    pipe = "yes | head -1; kill -TERM $$"
    done = cli(bed, "exec", "h1", "--", "bash", "-c", f"trap '' INT; {pipe}")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "y\n", "")
    assert cli(bed, "exec", "h1", "--", "echo", "--", "-o", "json").stdout == "-- -o json\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["h9", "--", "true"], 4, "host h9: is not in the testbed. Use one of h1, h2, client"),
        (["h1", "--", "/nowhere/x"], 127, "command /nowhere/x: cannot be run in h1"),
        (["h1", "--", "/etc/passwd"], 126, "command /etc/passwd: cannot be run in h1"),
        (["h1", "--"], 2, "testbed exec: missing the command"),
    ],
)
def test_exec_says_what_is_wrong(
    bed: Testbed, arguments: list[str], status: int, message: str
) -> None:
    done = cli(bed, "exec", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"vxmesh: {message}")


def test_exec_starts_where_the_host_has_that_directory_too(bed: Testbed) -> None:
    gone = Path("/run", f"vxt-{os.getpid()}")
    gone.mkdir()
    try:
        assert cli(bed, "exec", "h1", "pwd", cwd=gone).stdout == "/\n"
    finally:
        gone.rmdir()


def test_status_has_the_fields_of_the_interface(bed: Testbed) -> None:
    found = json.loads(cli(bed, "status", "-o", "json").stdout)
    assert [host["name"] for host in found["hosts"]] == ["h1", "h2"]
    for host in found["hosts"]:
        assert {"name", "namespace", "address", "agent", "socket"} <= set(host)
        assert host["agent"] == "stopped"
    assert found["client"]["address"] == "10.99.0.100"
    assert found["client"]["namespace"] == f"{bed.prefix}-client"
    table = cli(bed, "status").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["HOST", "h1", "h2", "client"]


def test_the_command_line_cuts_and_heals(bed: Testbed) -> None:
    one, two = bed.hosts
    for cut in (["cut", "h1"], ["cut", "h1", "--from", "h2"], ["loss", "h2", "100"]):
        assert cli(bed, *cut).returncode == 0
        assert not reaches(one, two.address), cut
        assert cli(bed, "heal", "h1").returncode == cli(bed, "heal", "h2").returncode == 0
        assert reaches_again(one, two.address), cut


# Up and down.


def test_up_twice_is_no_error_and_another_size_is(bed: Testbed) -> None:
    token = load(bed.prefix)
    Testbed.up(prefix=bed.prefix, with_agents=False)
    Testbed.up(2, prefix=bed.prefix, with_agents=False, ipv6=True)
    assert load(bed.prefix) == token
    with pytest.raises(Conflict, match="up with 2 hosts, not 3"):
        Testbed.up(3, prefix=bed.prefix, with_agents=False)
    assert cli(bed, "up", "--hosts", "5", "--no-agents").returncode == 5
    assert reaches(bed.host("h1"), bed.host("h2").address, within=10)


def test_up_tells_of_damage(bed: Testbed) -> None:
    subprocess.run(["ip", "netns", "del", bed.host("h2").namespace], check=True)
    with pytest.raises(Conflict, match="h2: is damaged"):
        Testbed.up(prefix=bed.prefix, with_agents=False)
    bed.down()
    assert traces(bed.prefix) == []


@pytest.mark.parametrize("hosts", [0, -1, 100])
def test_up_wants_a_number_of_hosts_that_fits(hosts: int) -> None:
    prefix = f"vxt-{os.getpid()}"
    with pytest.raises(Invalid, match="out of range"):
        Testbed.up(hosts, prefix=prefix)
    assert traces(prefix) == []


def test_up_refuses_what_it_cannot_do() -> None:
    prefix = f"vxt-{os.getpid()}"
    for bad in ("../x", "", "A", "x" * 40):
        with pytest.raises(Invalid, match="malformed"):
            Testbed.up(prefix=bad)
        with pytest.raises(Invalid, match="malformed"):
            take_down(bad)
    assert traces(prefix) == []


def test_up_leaves_a_namespace_of_others_alone() -> None:
    prefix = f"vxt-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", f"{prefix}-h1"], check=True)
    try:
        with pytest.raises(Conflict, match=f"{prefix}-h1: is there"):
            Testbed.up(1, prefix=prefix, with_agents=False)
        take_down(prefix)
        assert f"{prefix}-h1" in names("/run/netns")
        assert not directory_of(prefix).exists()
    finally:
        subprocess.run(["ip", "netns", "del", f"{prefix}-h1"], check=True)


def test_an_up_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = namespaces.make_mounts
    calls = []

    def fail_at_the_second(run: Path, resolv_conf: Path) -> int:
        calls.append(run)
        if len(calls) == 2:
            raise OSError("no more")
        return real(run, resolv_conf)

    monkeypatch.setattr(namespaces, "make_mounts", fail_at_the_second)
    prefix = f"vxt-{os.getpid()}"
    try:
        with pytest.raises(OSError, match="no more"):
            Testbed.up(2, prefix=prefix, with_agents=False)
        assert len(calls) == 2
        assert traces(prefix) == []
    finally:
        take_down(prefix)


@pytest.mark.parametrize("with_its_file", [False, True])
def test_an_up_bears_that_a_namespace_elsewhere_goes_meanwhile(
    with_its_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mount goes in all mount namespaces with its file: first the one, then the other."""
    netns = tmp_path / "netns"
    netns.touch()
    syscalls.mount("/proc/self/ns/net", str(netns), flags=syscalls.MS_BIND)
    real, met = syscalls.umount, []

    def too_late(target: str, flags: int = 0) -> None:
        if target == str(netns):
            met.append(target)
            real(target, syscalls.MNT_DETACH)
            if with_its_file:
                netns.unlink()
        real(target, flags)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "umount", too_late)
            with temporary(1, with_agents=False):
                assert met
    finally:
        if netns.exists():
            real(str(netns), syscalls.MNT_DETACH)


SELF_NAMED = """
import sys
with open("/proc/self/comm", "wb") as file:
    file.write(b"odd \\xff) \\xc3")
print(flush=True)
sys.stdin.read()
"""


def test_mounts_and_processes_of_others_may_be_called_anything(tmp_path: Path) -> None:
    odd = tmp_path / "\udcff\f\x85\u2028 \\ odd"
    odd.mkdir()
    pipe = subprocess.PIPE

    def work() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("vxt", str(odd), "tmpfs")
        assert str(odd) in mount_points()
        device = odd.stat().st_dev
        with subprocess.Popen([sys.executable, "-c", SELF_NAMED], stdin=pipe, stdout=pipe) as other:
            assert other.stdout is not None
            other.stdout.readline()
            assert syscalls.start_time(other.pid)
            shown = f"{os.major(device)}:{os.minor(device)}"
            assert processes.find("nobody's", [shown]) == [other.pid]
        syscalls.umount(str(odd))
        assert str(odd) not in mount_points()

    syscalls.in_thread(work)
    told = b"9 1 0:4 / /odd\r0\f\x85 rw - tmpfs a rw\n10 9 0:7 / /x rw - tmpfs b rw\n"
    assert list(processes.devices_in(told)) == [b"0:4", b"0:7"]


def test_down_bears_that_somebody_adds_a_namespace_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found empty, and used a moment later: /run/netns stays, with what is in it."""
    shared = tmp_path / "netns"
    shared.mkdir()
    syscalls.mount(str(shared), str(shared), flags=syscalls.MS_BIND)
    added = shared / "added"

    def too_late() -> list[str]:
        if not added.exists():
            added.touch()
            syscalls.mount("/proc/self/ns/net", str(added), flags=syscalls.MS_BIND)
        return mount_points()

    try:
        with monkeypatch.context() as patch:
            patch.setattr(fabric, "mount_points", too_late)
            fabric.undo([f"directory {shared}", f"mount {shared}"])
        assert {str(shared), str(added)} <= {*mount_points()}
        syscalls.umount(str(added), syscalls.MNT_DETACH)
        added.unlink()
        fabric.undo([f"directory {shared}", f"mount {shared}"])
        assert not shared.exists()
    finally:
        for point in (added, shared):
            while str(point) in mount_points():
                syscalls.umount(str(point), syscalls.MNT_DETACH)


def test_down_bears_that_somebody_uses_or_removes_a_directory_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, gone = tmp_path / "used", tmp_path / "gone"
    used.mkdir()
    gone.mkdir()
    real = Path.rmdir

    def too_late(path: Path) -> None:
        if path == used:
            (used / "theirs").touch()
        else:
            real(gone)
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", too_late)
        fabric.undo([f"directory {used}", f"directory {gone}"])
    assert names(str(tmp_path)) == ["used"] and names(str(used)) == ["theirs"]


@pytest.mark.parametrize(
    ("others", "stays"),
    [
        ([], False),
        ([State("other", ipv6=False)], False),  # it has begun, and has yet to look for them
        ([State("other", ipv6=False, made=["directory {}"])], True),
        ([State("begun", ipv6=False), State("other", ipv6=False, made=["directory {}"])], True),
    ],
)
def test_what_was_made_goes_with_the_last_that_stands_on_it(
    others: list[State], stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_file, "RUN_DIR", str(tmp_path / "vxmesh-testbed"))
    made = tmp_path / "made"
    for path in (made, directory_of("mine")):
        path.mkdir()
    for other in others:
        directory_of(other.prefix).mkdir()
        save(dataclasses.replace(other, made=[entry.format(made) for entry in other.made]))
    state_file.remove("mine", [f"directory {made}"])
    assert made.exists() == stays
    assert not directory_of("mine").exists()


def test_two_testbeds_stand_side_by_side(bed: Testbed) -> None:
    with temporary(1, with_agents=False) as other:
        assert not reaches(other.host("h1"), "10.99.0.2")
        assert reaches(bed.host("h1"), "10.99.0.2", within=10)
    assert traces(other.prefix) == []
    assert reaches(bed.host("h1"), "10.99.0.2", within=10)
    bed.host("h1").run(["touch", f"{STATE_DIR}/still-there"], check=True)


def test_down_leaves_nothing_and_twice_is_no_error() -> None:
    before = machine_alone()
    bed = Testbed.up(2, prefix=f"vxt-{os.getpid()}", with_agents=False)
    try:
        token, hosts = load(bed.prefix), bed.hosts
        assert token is not None
        bed.loss("h1", 5)
        started = [
            # what only SIGKILL ends
            hosts[0].popen(["sh", "-c", "trap '' TERM HUP; while :; do sleep 0.1; done"]),
            # a workload: namespaces and a session of its own, and no environment left
            hosts[1].popen(
                ["env", "-i", "unshare", "--net", "--mount", "setsid", "--wait", "sleep", "600"]
            ),
            # in the host's network, but not by the testbed's hand
            subprocess.Popen(["nsenter", f"--net={hosts[0].netns}", "sleep", "600"]),
        ]
        try:
            for process in started:  # each has become what it is to be
                wait_for(partial(_sleeps, process.pid), f"{process.args!r} started")
            assert bed.down() == [started[2].pid]
            assert started[2].poll() is None
            assert started[0].wait(30) == -signal.SIGKILL
            assert started[1].wait(30) != 0
        finally:
            for process in started:
                process.kill()
                process.wait()
        assert processes.find(token.token, []) == []
        assert traces(bed.prefix) == []
        if before and (after := machine_alone()):
            assert after == before
        assert bed.down() == []
        with pytest.raises(NotFound, match="is not up"):
            bed.status()
    finally:
        bed.down()


Machine = tuple[bool, bool, list[str]]


def machine() -> Machine:
    """What a testbed may have to make, and the mounts, but for what other tests make meanwhile:
    namespaces, and whatever is in their own directories."""
    others = ("/run/netns/", f"{tempfile.gettempdir()}/")
    mounts = [point for point in mount_points() if not point.startswith(others)]
    return Path(STATE_DIR).exists(), Path("/run/netns").exists(), mounts


def machine_alone() -> Machine | None:
    """The same where no testbed stands; None if one does, as others' tests have theirs: it may
    come or go while this looks."""
    with machine_locked():  # none comes or goes
        return None if list(Path("/run").glob("vxmesh-testbed*")) else machine()


def _sleeps(pid: int) -> bool:
    """Whether the process, or one that it started, is a sleep."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return Path(f"/proc/{pid}/comm").read_text() == "sleep\n" or any(
            _sleeps(int(child)) for child in children
        )
    except OSError:
        return False


def test_where_the_kernel_refuses_a_process_keeps_the_mounts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(fd: int, file: Path) -> None:
        raise OSError("refused")

    monkeypatch.setattr(namespaces, "keep", refuse)
    with temporary(2, with_agents=False) as bed:
        state = load(bed.prefix)
        assert state is not None
        holders = [host.holder for host in state.hosts]
        assert all(syscalls.start_time(pid) for pid in holders)
        bed.host("h1").run(["touch", "/run/mine"], check=True)
        assert (bed.host("h1").run_dir / "mine").exists()
        assert bed.host("h2").run(["ls", "/run"], check=True).stdout == ""
    assert not any(syscalls.start_time(pid) for pid in holders)
    assert traces(bed.prefix) == []


def test_a_down_takes_no_other_testbeds_processes_for_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It knows its own by a mount of theirs, whose number must not be another's while it looks."""

    def refuse(fd: int, file: Path) -> None:
        raise OSError("refused")

    def mount_many() -> set[str]:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
        found = set()
        for number in range(20):  # the kernel gives the lowest number that is free
            (place := tmp_path / str(number)).mkdir()
            syscalls.mount("vxt", str(place), "tmpfs")
            device = place.stat().st_dev
            found.add(f"{os.major(device)}:{os.minor(device)}")
        return found

    real_find, real_end = processes.find, processes.end
    looked_for: list[str] = []
    others: set[str] = set()

    def find(token: str, devices: Sequence[str]) -> list[int]:
        looked_for[:] = devices
        return real_find(token, devices)

    def end(find_them: Callable[[], list[int]], grace: float) -> None:
        real_end(find_them, grace)
        if looked_for:  # the hosts' own processes have ended
            others.update(syscalls.in_thread(mount_many))

    monkeypatch.setattr(namespaces, "keep", refuse)
    with temporary(1, with_agents=False):
        monkeypatch.setattr(processes, "find", find)
        monkeypatch.setattr(processes, "end", end)
    assert len(looked_for) == 2 and others
    assert not others & {*looked_for}


# Agents.

STAND_IN = """
import json, os, signal, socket, sys, time
if os.path.exists("{flag}"):
    sys.exit("cannot: no such thing")
with open("/run/started.json", "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
os.makedirs("/run/vxmesh", exist_ok=True)
if os.path.exists("/run/vxmesh/agent.sock"):
    os.unlink("/run/vxmesh/agent.sock")
with socket.socket(socket.AF_UNIX) as sock:
    sock.bind("/run/vxmesh/agent.sock")
    sock.listen()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        sock.accept()[0].close()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Agents that only listen; they fail to start while the file given exists."""
    flag = tmp_path / "fail"
    package = tmp_path / "agent"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN.format(flag=flag))
    monkeypatch.setattr(agents, "PACKAGE_ROOT", str(tmp_path))
    monkeypatch.setattr(agents, "wait_joined", lambda sockets, seconds: None)
    monkeypatch.setattr(agents, "read_token", lambda socket: "VXM-1-for-all")
    return flag


def started_with(host: Host) -> tuple[list[str], dict[str, str]]:
    arguments, environment = json.loads((host.run_dir / "started.json").read_text())
    return arguments, environment


def test_agents_start_with_their_address_and_without_the_callers_settings(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VXMESH_PORT", "1")
    monkeypatch.setenv("VXMESH_HOST", "unix:///elsewhere")
    said: list[str] = []
    shown: list[str] = []
    options = ["--port", "7000"]
    with temporary(3, agent_options=options, say=said.append, show=shown.append) as bed:
        join = ["--join", "10.99.0.1", "--token", "VXM-1-for-all"]
        expected = {"h1": [], "h2": join, "h3": join}
        assert shown == [f"{name}: vxmesh agent {' '.join(join)}" for name in ("h2", "h3")]
        for host in bed.hosts:
            arguments, environment = started_with(host)
            assert arguments == [
                "agent", "--name", host.name, "--advertise", host.address,
                *expected[host.name], "--port", "7000",
            ]  # fmt: skip
            assert "VXMESH_PORT" not in environment
            assert environment["VXMESH_HOST"] == "unix:///run/vxmesh/agent.sock"
            assert environment["VXMESH_TESTBED"] == host.name
        assert [host["agent"] for host in bed.status()["hosts"]] == ["running"] * 3
        assert len(said) == 5
        pids = [host.pid for host in bed.hosts]
        assert all(os.getsid(pid) == pid for pid in pids)
    assert not any(syscalls.start_time(pid) for pid in pids)


def test_kill_ends_the_agent_alone_and_start_brings_it_back(stand_in: Path) -> None:
    with temporary(2) as bed, bed.host("h1").popen(["sleep", "600"]) as other:
        pid = bed.host("h1").pid
        for _ in range(2):  # killing a dead one is no error
            bed.kill("h1")
            assert syscalls.start_time(pid) == 0
            assert [host["agent"] for host in bed.status()["hosts"]] == ["stopped", "running"]
        assert other.poll() is None
        bed.start("h1")
        again = bed.host("h1")
        assert again.is_running
        assert again.pid != pid
        assert "10.99.0.2" in started_with(again)[0]  # it joins one that runs
        bed.start("h1")
        assert bed.host("h1").pid == again.pid
        bed.kill("h2")
        Testbed.up(prefix=bed.prefix)
        assert bed.host("h2").is_running
        assert bed.host("h1").pid == again.pid
        other.kill()


def test_an_agent_that_does_not_start_shows_its_log(stand_in: Path) -> None:
    stand_in.touch()
    prefix = f"vxt-{os.getpid()}"
    try:
        with pytest.raises(VxmeshError, match="the agent of h1: ended while it started") as caught:
            Testbed.up(2, prefix=prefix)
        assert "cannot: no such thing" in str(caught.value)
        bed = Testbed.find(prefix)
        assert "cannot: no such thing" in bed.host("h1").log.read_text()
        assert reaches(bed.host("h1"), "10.99.0.2", within=10)  # the hosts stay, to look at
        stand_in.unlink()
        Testbed.up(2, prefix=prefix)
        assert all(host.is_running for host in bed.hosts)
    finally:
        take_down(prefix)
    assert traces(prefix) == []


def test_an_agent_that_hangs_is_killed_by_down(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.testbed.bed.AGENT_GRACE", 0.3)
    with temporary(1) as bed:
        pid = bed.host("h1").pid
        os.kill(pid, signal.SIGSTOP)
    assert syscalls.start_time(pid) == 0
    assert traces(bed.prefix) == []


def test_the_tools_that_are_needed_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ip = shutil.which("ip")
    assert ip is not None
    (tmp_path / "ip").symlink_to(ip)
    with temporary(1, with_agents=False) as bed:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            with pytest.raises(Unsupported, match=r"needs the program nft.*install nftables"):
                bed.cut("h1", "client")
        assert reaches(bed.host("h1"), bed.client.address, within=10)
        assert bed.status()["hosts"][0]["cut_from"] == []
