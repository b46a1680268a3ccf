"""Crashes at the moments that matter. Each was a failure once, or would be one without the
line of code that it names."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agent.core.replica import JUMP, Delta
from agent.errors import VxmeshError
from agent.requests import parse_endpoint, parse_network
from tests.sim.crashes import CrashCluster, CrashNode
from tests.sim.network import Weather

COMMIT = 0.1  # s that a commit takes here: time enough to crash in


class Play:
    """A cluster in fair weather and what is done with it, a step at a time."""

    def __init__(self, count: int) -> None:
        self.cluster = CrashCluster(1, count, latency=(COMMIT, COMMIT))
        self.hosts = self.cluster.hosts()
        self.errors: list[VxmeshError] = []
        self.wait(3)

    def wait(self, seconds: float) -> None:
        self.cluster.clock.run_until(self.cluster.clock.now + seconds)
        self.cluster.check_always()

    def network(self, host: CrashNode, name: str = "net", subnet: str = "10.1.0.0/24") -> str:
        return host.state.create_network(parse_network(name, subnets=[subnet])).id

    def announce(self, host: CrashNode, network: str, name: str, *addresses: str) -> None:
        job = host.run(network, parse_endpoint(name, addresses=addresses))
        host.loop.run(job, failed=self.errors.append)

    def remove(self, host: CrashNode, name: str) -> None:
        id = host.state.find_endpoint(name)[1].endpoint.id
        host.loop.run(host.remove(id), failed=self.errors.append)

    def apart(self, *hosts: CrashNode) -> None:
        self.cluster.partition({host.id for host in hosts}, one_way=False)

    def heal(self) -> None:
        cut = {(min(a, b), max(a, b)) for a, b in self.cluster.wire.cut}
        self.cluster.wire.cut.clear()
        for a, b in sorted(cut):
            self.cluster.reconnect(a, b)

    def end(self) -> None:
        for host in self.hosts:
            if not host.is_up:
                host.start()
        self.heal()
        self.wait(15)
        self.cluster.check_equal()
        self.cluster.check_promises()
        self.cluster.check_conflicts()

    def names(self, host: CrashNode) -> set[str]:
        members = host.state.members.values()
        return {m.endpoint.name for net in members for m in net.all.values()}


@pytest.mark.parametrize("committed", [False, True])
def test_killed_between_a_write_and_its_publication(committed: bool) -> None:
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.wait(1)
    play.announce(a, net, "x")
    play.wait(COMMIT / 2)
    assert play.names(b) == set(), "not told before it is on disk"
    a.kill(committed)
    a.start()
    play.end()
    assert play.names(b) == ({"x"} if committed else set())


@pytest.mark.parametrize("committed", [False, True])
def test_the_donor_is_killed_in_the_middle_of_a_donation(committed: bool) -> None:
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.wait(1)
    owned = a.state.addresses[net].ring.owned(a.id, 4)
    play.announce(b, net, "x")
    play.wait(COMMIT / 2)
    assert a.state.addresses[net].ring.owned(a.id, 4) != owned, "given away, in memory"
    a.kill(committed)
    play.wait(3)
    assert len(play.errors) == 1, "no answer: b has nothing"
    a.start()
    assert (a.state.addresses[net].ring.owned(a.id, 4) == owned) is not committed
    play.wait(3)
    play.announce(a, net, "y")
    play.announce(b, net, "z")
    play.end()
    assert play.names(a) == {"y", "z"}


def test_the_asker_is_killed_while_the_donation_is_on_its_way() -> None:
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.wait(1)
    play.announce(b, net, "x", "10.1.0.9")
    play.wait(COMMIT)
    b.kill()
    b.start()
    play.wait(3)
    assert "x" not in play.names(b)
    play.announce(b, net, "y", "10.1.0.9")
    play.end()
    assert play.names(a) == {"y"}


def test_a_donation_outlives_a_power_cut() -> None:
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.wait(1)
    play.announce(b, net, "x", "10.1.0.9")
    play.wait(1)
    a.cut_power(kept=0)
    a.start()
    play.wait(0.5)
    play.announce(a, net, "y", "10.1.0.9")
    play.end()
    assert play.names(a) == {"x"}


def test_versions_that_a_power_cut_took_back_are_never_used_again() -> None:
    """Without core/replica.py: beyond. c has versions of a that a knows nothing of; a, which
    goes on where its disk ends, has passed them when they meet, and c never hears of it."""
    play = Play(3)
    a, b, c = play.hosts
    net = play.network(a)
    play.wait(2)
    play.apart(b)
    for number in range(4):
        play.announce(a, net, f"lost-{number}")
    play.wait(5)
    assert len(play.names(c)) == 4
    a.cut_power(kept=0)
    play.heal()
    play.apart(c)
    a.start()
    for number in range(8):
        play.announce(a, net, f"kept-{number}")
    play.wait(6)
    assert play.names(a) == play.names(b)
    assert a.state.replica.written() > JUMP
    play.end()
    assert play.names(c) == play.names(a) == {f"kept-{n}" for n in range(8)}


def test_killed_right_after_a_power_cut() -> None:
    """Seed 822: the boot id was on disk before the higher versions were, so the start after
    the next one took nothing for lost (agent/restart.py: set_meta)."""
    play = Play(3)
    a, b, _ = play.hosts
    net = play.network(a)
    play.wait(2)
    play.announce(a, net, "lost")
    play.wait(1)
    a.cut_power(kept=0)
    a.start()
    a.kill(committed=False)
    a.start()
    play.announce(a, net, "kept")
    play.end()
    assert play.names(b) == {"kept"}


def test_power_cut_before_anything_was_synced() -> None:
    """Seed 105: with no record on disk nothing seemed lost, and version 1 was written twice."""
    play = Play(2)
    a, b = play.hosts
    assert b.state.version(a.id) == 1
    a.cut_power(kept=0)
    assert a.disk.load()[1] == []
    a.start()
    play.end()
    assert b.state.nodes[a.id].incarnation == 2


def test_a_delta_for_one_who_has_nothing_comes_to_one_who_has_a_part() -> None:
    """Seed 26, and possible without any crash: b told a that it has nothing, then got an old
    state of a from c, then what a sent to one who has nothing, in which what was removed in
    between is not mentioned (core/replica.py: merge). b had x for ever."""
    play = Play(3)
    a, b, c = play.hosts
    net = play.network(a)
    play.announce(a, net, "x")
    play.wait(2)
    old = Delta(a.id, 0, c.state.version(a.id), c.state.since(a.id, 0))
    assert c.state.prove(old, introduce=True)
    play.apart(c)
    play.remove(a, "x")
    play.wait(1)
    play.announce(a, net, "y")
    play.wait(1)
    a.state.replica.collect(a.id, a.state.version(a.id))
    floor, version = a.state.floor(a.id), a.state.version(a.id)
    late = Delta(a.id, 0, version, a.state.since(a.id, 0), floor)
    assert a.state.prove(late, introduce=True)
    b.kill()
    b.disk.forget()
    b.start()
    b.state.merge(old, c.id)
    assert play.names(b) == {"x"}
    b.state.merge(late, a.id)
    play.end()
    assert play.names(b) == {"y"}


def test_a_record_is_told_though_a_newer_one_waits_for_the_disk() -> None:
    """Seed 1149: a told b of everything up to its claims, but not the claims themselves, since
    newer ones were on their way to the disk, and was killed before they came there. It had
    the older ones again, and b never had any (core/replica.py: the published past)."""
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.wait(1)
    a.state.donate(net, b.id, 4, [])  # the claims that b is told of
    play.wait(COMMIT * 0.9)
    a.state.donate(net, b.id, 4, [])  # and newer ones, before those are told
    play.wait(COMMIT * 0.5)
    a.kill(committed=False)
    a.start()
    play.end()
    owned = b.state.addresses[net].ring.owned(b.id, 4)
    assert owned and owned == a.state.addresses[net].ring.owned(b.id, 4)


def fail_one(host: CrashNode) -> None:
    """The commit that begins now fails; those that follow do not."""
    host.disk.failing = 1.0
    host.cluster.clock.after(COMMIT * 1.5, lambda: setattr(host.disk, "failing", 0.0))


def test_what_follows_a_failed_write_is_not_written_on_top_of_the_hole() -> None:
    """Without store.Holes: b's disk has a's state up to y, and not x, which came before it. A b
    that is killed before it can write all of a's anew never asks for x again."""
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.wait(3)
    play.announce(a, net, "x")
    play.wait(0.25)
    play.announce(a, net, "y")
    play.wait(COMMIT * 0.7)
    assert play.names(b) == {"x"}
    fail_one(b)
    b.state.describe(b.state.nodes[b.id])  # which has what is known of others kept as well
    play.wait(COMMIT * 0.6)
    assert play.names(b) == {"x", "y"}
    b.state.describe(b.state.nodes[b.id])
    play.wait(COMMIT * 1.6)
    b.kill()
    b.start()
    play.end()
    assert play.names(b) == {"x", "y"}


@pytest.mark.parametrize("end", [CrashNode.kill, CrashNode.cut_power])
def test_a_removal_that_fails_and_a_donation_behind_it(end: Callable[[CrashNode], None]) -> None:
    play = Play(2)
    a, b = play.hosts
    net = play.network(a, subnet="10.1.0.0/29")
    play.announce(a, net, "x", "10.1.0.6")
    play.wait(1)
    play.network(a, "sync", "10.2.0.0/24")
    play.wait(3)
    fail_one(a)
    play.remove(a, "x")
    play.wait(COMMIT / 2)
    play.announce(b, net, "y")
    play.wait(2 * COMMIT)
    end(a)
    a.start()
    play.end()
    assert "x" in play.names(a) == play.names(b)


def test_an_old_backup_is_surpassed() -> None:
    """core/replica.py: surpass; nothing but what peers say tells of it."""
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.announce(a, net, "x")
    play.wait(2)
    backup = a.disk.load()
    for number in range(5):
        play.announce(a, net, f"lost-{number}")
    play.wait(1)
    a.kill()
    a.disk.set_back(*backup)
    a.made = {e.id: e for e in a.made.values() if e.name == "x"}
    a.start()
    play.end()
    assert play.names(a) == play.names(b) == {"x"}


def test_a_sandbox_that_lives_is_adopted_and_one_that_ended_is_not() -> None:
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.wait(1)
    for box in ("1" * 16, "2" * 16):
        a.boxes.add(box)
        a.loop.run(a.run(net, parse_endpoint(f"w{box[0]}"), box))
    play.wait(2)
    kept = a.state.find_endpoint("w1")[1].endpoint
    a.kill()
    a.end_box("2" * 16)
    a.start()
    play.end()
    assert play.names(b) == {"w1"}
    assert a.state.find_endpoint("w1")[1].endpoint == kept
    a.cut_power()
    a.start()
    play.end()
    assert play.names(b) == set()


def test_networks_made_twice_while_clocks_are_minutes_apart() -> None:
    play = Play(4)
    a, b, c, d = play.hosts
    a.skew, c.skew = 180.0, -180.0
    play.network(a, "seen", "10.9.0.0/24")
    play.wait(2)
    play.apart(c, d)
    first = play.network(a)
    play.announce(b, first, "x")
    second = play.network(d)
    play.announce(c, second, "y")
    play.wait(2)
    c.kill()
    c.skew -= 120.0
    c.start()
    play.wait(1)
    play.heal()
    play.wait(2)
    assert {n.name for n in c.state.catalogue.all()} == {"seen", "net", f"net-{second[:6]}"} or {
        n.name for n in c.state.catalogue.all()
    } == {"seen", "net", f"net-{first[:6]}"}
    third = play.network(c, "later", "10.8.0.0/24")
    born = {n.id: n.born for n in c.state.catalogue.all()}
    assert max(born, key=lambda id: born[id]) == third, "the youngest, five minutes back or not"
    play.end()


def test_the_loser_stays_what_it_became_while_its_creator_is_away() -> None:
    play = Play(3)
    a, b, c = play.hosts
    play.apart(c)
    first, second = play.network(a), play.network(c)
    play.announce(c, second, "y")
    play.wait(1)
    play.heal()
    play.wait(0.01)
    c.kill()  # before it could write down that it has lost
    play.wait(2)
    loser = max(b.state.catalogue.all(), key=lambda n: n.name)
    winner = first if loser.id == second else second
    if winner == first:
        assert list(b.state.catalogue.unsettled()) == [loser]
        b.state.remove_network(first)
        play.wait(2)
        kept = a.state.catalogue.get(second)
        assert kept and (kept.name, kept.vni) == (loser.name, loser.vni)
    play.end()


def test_a_long_storm_of_kills_on_one_host() -> None:
    play = Play(2)
    a, b = play.hosts
    net = play.network(a)
    play.wait(2)
    for number in range(40):
        play.announce(a, net, f"x{number}")
        if number % 3 == 2:
            play.remove(a, f"x{number}")
        play.wait(COMMIT * (number % 7) / 5)
        a.kill()
        a.start()
    play.end()
    assert b.state.nodes[a.id].incarnation == 41


def test_bad_weather_alone_is_not_needed() -> None:
    """The weather of these scenarios is fair: what fails here is not a matter of luck."""
    assert Play(1).cluster.wire.weather == Weather(0.0, 0.0, (0.0001, 0.001), 0)
