"""A command that runs for us has each signal once, whoever sent it, and we end as it does."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PATIENCE = 30.0  # s, for a process's answer

OURS = """
import os, sys
from agent.cli import relay

held = relay.hold()
child = relay.fork()
if not child:
    relay.release(held)
    os.execv(sys.executable, [sys.executable, "-u", "-c", sys.argv[1], *sys.argv[2:]])
sys.exit(relay.reap(child))
"""

# Tells what it gets on the file of the given number, until SIGTERM has come.
COMMAND = """
import os, signal, sys
told = int(sys.argv[1])

def tell(number, frame):
    os.write(told, f"{number}\\n".encode())
    if number == signal.SIGTERM: sys.exit(7)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, tell)
os.write(told, f"{os.getpid()}\\n".encode())
while True: signal.pause()
"""

# Us, who wait for a signal between the two; the command would end by itself.
LATE = """
import os, signal, sys, time
from agent.cli import relay

for number in (signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore some

held = relay.hold()
os.write(1, b"held")
deadline = time.monotonic() + 30
while not signal.sigpending() and time.monotonic() < deadline: time.sleep(0.005)
child = relay.fork()
if not child:
    relay.release(held)
    os._exit(3)
sys.exit(relay.reap(child))
"""


class Relay:
    """Us, at a terminal that we alone have, and the command that we run."""

    def __init__(self) -> None:
        read, write = os.pipe()
        os.set_inheritable(write, True)
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.execv(sys.executable, [sys.executable, "-c", OURS, COMMAND, str(write)])
        os.close(write)
        self._told = os.fdopen(read)
        self._status: int | None = None
        self.command = self.told()

    def told(self) -> int:
        """What the command tells next; 0 if it has ended."""
        assert select.select([self._told], [], [], PATIENCE)[0]
        return int(self._told.readline() or 0)

    def status(self) -> int:
        """How we ended."""
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(self._status)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def hang_up(self) -> None:
        os.close(self.terminal)
        self.terminal = -1

    def end(self) -> None:
        if self.terminal >= 0:
            self.hang_up()
        self._told.close()
        if self._status is None:
            os.kill(self.command, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
            self.status()


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.end()


def test_the_command_gets_once_what_a_process_sends_us(relay: Relay) -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT, signal.SIGTERM):
        os.kill(relay.pid, number)
        assert relay.told() == number
    assert relay.told() == 0 and relay.status() == 7


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
def test_the_command_gets_once_what_its_terminal_sends(
    relay: Relay, key: bytes, number: signal.Signals
) -> None:
    relay.pause()  # or what we passed on would be one with what the command has not taken yet
    os.write(relay.terminal, key)
    assert relay.told() == number
    os.kill(relay.pid, signal.SIGCONT)
    os.kill(relay.pid, signal.SIGHUP)
    assert relay.told() == signal.SIGHUP
    os.kill(relay.pid, signal.SIGTERM)
    assert relay.told() == signal.SIGTERM and relay.status() == 7


def test_a_hang_up_that_only_we_are_told_of_reaches_the_command(relay: Relay) -> None:
    relay.hang_up()
    assert relay.told() == signal.SIGHUP
    os.kill(relay.pid, signal.SIGTERM)
    assert relay.told() == signal.SIGTERM and relay.status() == 7


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
def test_what_a_terminal_sends_just_before_the_fork_is_not_lost(
    key: bytes, number: signal.Signals
) -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", LATE])
    try:
        assert select.select([terminal], [], [], PATIENCE)[0] and os.read(terminal, 4) == b"held"
        os.write(terminal, key)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number
    finally:
        os.close(terminal)


@pytest.mark.parametrize("number", RELAYED)
def test_we_end_as_the_command_does(number: signal.Signals) -> None:
    # Whoever runs the tests may ignore some (nohup, a shell's background): commands inherit that.
    ends = (
        "import os, signal, sys; signal.signal(int(sys.argv[1]), signal.SIG_DFL);"
        "os.kill(os.getpid(), int(sys.argv[1]))"
    )
    command = [sys.executable, "-c", OURS, ends, str(int(number))]
    assert subprocess.run(command, timeout=PATIENCE).returncode == 128 + number


def test_an_end_is_seen_by_who_was_started_ignoring_them() -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, "-c", OURS, "raise SystemExit(3)"]
    assert subprocess.run(command, timeout=PATIENCE).returncode == 3


# It is to start a command that waits for the end of its stdin; SIGTERM comes when that may begin.
STARTS = """
import os, signal, sys
from types import SimpleNamespace
from agent.cli import run

def write(fd, data):
    os.write(fd, data)
    os.kill(os.getpid(), signal.SIGTERM)

child = run._Child(["cat"], False, "", False)
child.await_ready()
run.os = SimpleNamespace(write=write, close=os.close)
child.start("")
run.os = os
sys.exit(child.wait())
"""


def test_a_signal_just_after_the_go_reaches_what_was_started() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS], stdin=subprocess.PIPE) as ours:
        assert ours.wait(PATIENCE) == 128 + signal.SIGTERM, "the command was ended, then we"
