"""Membership in a cluster of 60 on the virtual clock: small brothers of the runs with 1,000.

A failure prints the command that replays it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from agent.core.membership import PRESETS
from tests.sim.__main__ import main
from tests.sim.large.host import Host, Protocol
from tests.sim.large.run import Figures, Options, Run

SMALL = Options(nodes=60, seed=7, minutes=0.3)


def play(options: Options) -> Figures:
    return Run(options).play()


def test_a_silent_node_is_found_by_all() -> None:
    figures = play(replace(SMALL, loss=0.05, kill=True))
    assert len(figures.detected) == 59
    assert max(figures.detected) < 3.5
    assert figures.suspicions == 1


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_in_a_small_cluster_within_two_seconds_with_everything_late(nodes: int) -> None:
    worst = []
    for seed in range(20):
        options = Options(nodes=nodes, seed=seed, minutes=0.2, noise=0.1, kill=True)
        figures = play(options)
        assert figures.suspicions == 1, options.command()
        worst.append(max(figures.detected))
    assert 1.2 < sorted(worst)[len(worst) // 2] < 1.7
    assert sorted(worst)[-2] < 2.0


def test_loss_and_slow_nodes_kill_nobody() -> None:
    figures = play(replace(SMALL, loss=0.25, slow=0.05, minutes=0.5))
    assert figures.false_positives == []
    assert figures.suspicions > 3, "nothing was tested: nobody was ever in doubt"


def test_a_dead_agent_is_not_a_dead_host() -> None:
    figures = play(replace(SMALL, loss=0.05, refuse=True))
    assert len(figures.refused) == 59
    assert max(figures.refused) < 2.0
    assert figures.detected == []


def test_halves_find_each_other_again_and_bury_nobody() -> None:
    figures = play(replace(SMALL, split=12.0, minutes=0.4))
    assert figures.false_positives == []
    assert figures.healed < 3.0


def test_a_small_cluster_heals_at_once() -> None:
    figures = play(Options(nodes=5, seed=3, split=12.0, minutes=0.4))
    assert figures.healed < 0.5


def test_a_quiet_cluster_is_quiet() -> None:
    figures = play(SMALL)
    assert figures.suspicions == 0
    assert figures.messages < 12.0  # 3.3 pings, as many answers, and a digest a stream each 2 s


def test_the_same_seed_is_the_same_run() -> None:
    options = replace(SMALL, nodes=20, loss=0.25, slow=0.1, kill=True)
    first, again, other = play(options), play(options), play(replace(options, seed=8))
    assert first.digest == again.digest
    assert first.digest != other.digest


def test_the_same_seed_is_the_same_run_in_another_process() -> None:
    options = replace(SMALL, nodes=20, loss=0.25, slow=0.1, kill=True)
    told = subprocess.run(
        [sys.executable, *options.command().split()[1:]],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"run {play(options).digest:016x}" in told


def test_a_failure_tells_how_to_replay_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hasty = replace(PRESETS["lan"], suspicion_min=0.01, probe_timeout=0.001)
    monkeypatch.setitem(PRESETS, "lan", hasty)
    options = replace(SMALL, nodes=20, loss=0.4, slow=0.2, minutes=0.2)
    with pytest.raises(AssertionError, match="a live node was believed dead") as failure:
        play(options)
    command = str(failure.value).split("replay: ")[1]
    monkeypatch.setattr(sys, "argv", command.split()[2:])
    assert main() == 1
    told = capsys.readouterr().out
    assert str(failure.value) in told


def test_a_host_runs_more_protocols_than_membership() -> None:
    class Counter(Protocol):
        """Tells its neighbours a number, once."""

        heard: list[tuple[str, str, int]] = []  # noqa: RUF012 - of all hosts

        def start(self) -> None:
            for number, peer in enumerate(self.host.neighbours):
                self.send(self.host.world.hosts[peer], number, 1)

        def receive(self, peer: Host, message: int) -> None:
            self.heard.append((self.host.id, peer.id, message))

    run = Run(replace(SMALL, nodes=40), [Counter])
    run.play()
    links = {(h.id, p) for h in run.hosts for p in h.neighbours}
    assert {(to, by) for to, by, _ in Counter.heard} == links
    assert len(Counter.heard) == len(links)
