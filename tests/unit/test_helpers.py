"""What tests stand on: echoes end with the test that sent them."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
