"""A call of the command line that is interrupted."""

from __future__ import annotations

import subprocess
import sys

# The signal is handled by another thread than the one that waits, as when it comes a moment
# before that one waits: nothing but a file that the loop watches can end the wait then.
PROGRAM = """
import asyncio, signal, threading, time
from agent.cli import calls

class Nobody:
    def __init__(self, *_): pass
    async def __aenter__(self): return self
    async def __aexit__(self, *_): pass

async def wait(client):
    waiting.set()
    if {is_ignored}:
        while not sent.is_set(): await asyncio.sleep(0.01)
        print("went on")
    else:
        await asyncio.sleep(3600)

def interrupt():
    waiting.wait()
    while state() != "S": time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    sent.set()

def state():
    return open(f"/proc/self/task/{main}/stat").read().rpartition(")")[2].split()[0]

calls.Client, main = Nobody, threading.get_native_id()
waiting, sent = threading.Event(), threading.Event()
if {is_ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)
threading.Thread(target=interrupt, daemon=True).start()
try:
    calls.call("", wait)
except KeyboardInterrupt:
    print("interrupted")
"""


def run(is_ignored: bool) -> tuple[str, str, int]:
    program = PROGRAM.replace("{is_ignored}", str(is_ignored))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout, done.stderr, done.returncode


def test_an_interruption_ends_a_wait_for_nothing() -> None:
    assert run(is_ignored=False) == ("interrupted\n", "", 0)


def test_who_was_told_to_ignore_it_goes_on() -> None:
    assert run(is_ignored=True) == ("went on\n", "", 0)
