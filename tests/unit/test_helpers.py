"""What tests stand on: echoes end with the test that sent them, there is a free port, and nothing
fails for being slow."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import ports
from tests.netns.echoes import Echoes

# As ping tells of answers, until it is ended.
ANSWERS = """
import itertools, time
for number in itertools.count(1):
    print(f"64 bytes: icmp_seq={number} ttl=64", flush=True)
    time.sleep(0.005)
"""


def answers() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", ANSWERS], stdout=subprocess.PIPE, text=True)


def test_echoes_end_with_a_test_that_fails() -> None:
    process = answers()
    with pytest.raises(AssertionError, match="what it is about"), Echoes(process):
        raise AssertionError("what it is about")
    assert process.returncode is not None


def test_echoes_that_have_ended_tell_what_was_lost() -> None:
    with Echoes(answers()) as echoes:
        assert echoes.end() == []
        assert echoes.process.returncode is not None


@pytest.mark.parametrize("given", ["32768\t60999", "20000\t60999", "1024\t65535"])
def test_a_port_is_free_whatever_the_kernel_gives_by_itself(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "_GIVEN", tmp_path / "range")
    (tmp_path / "range").write_text(f"{given}\n")
    with socket.create_server(("", ports.free_port())) as server:
        assert server.getsockname()[1] >= 1024


def test_no_port_is_given_twice_nor_to_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was: a server found its port taken by a test of the other worker."""
    monkeypatch.setattr(ports, "_GIVEN", tmp_path / "range")
    (tmp_path / "range").write_text("61000\t61399\n")
    monkeypatch.setattr(ports, "_LEAST", 61_000)
    monkeypatch.setattr(ports, "_WORKERS", 2)
    given = []
    for worker in (0, 1):
        monkeypatch.setattr(ports, "_WORKER", worker)
        given.append({ports.free_port() for _ in range(100)})
    assert [len(some) for some in given] == [100, 100]
    assert not given[0] & given[1]


@given(st.none())
def test_no_example_is_too_slow(nothing: None) -> None:
    """A test failed so, of which one example had to wait for the machine."""
    assert settings.default is not None and settings.default.deadline is None
    assert HealthCheck.too_slow in settings.default.suppress_health_check
    time.sleep(0.3)
