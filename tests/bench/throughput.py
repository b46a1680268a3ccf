"""TCP from one place to another, one stream, by iperf3(1)."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.world import Missing

SECONDS = 3  # of traffic a figure
START_TIMEOUT = 10.0  # seconds until the server takes connections
SERVER = ["iperf3", "-s"]


@dataclass(frozen=True, slots=True)
class Lane:
    """A way that has a server (SERVER) at its end."""

    address: str  # the server's, as the client reaches it
    run: Callable[[Sequence[str]], str]  # a command where the client is; its stdout

    def measure(self) -> float:
        """Gbit/s that the server received."""
        command = ["iperf3", "-c", self.address, "-t", str(SECONDS), "-J"]
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                result = json.loads(self.run(command))
                return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9
            except subprocess.CalledProcessError as error:
                if time.monotonic() > deadline:
                    error.add_note(f"stdout: {error.stdout!r}; stderr: {error.stderr!r}")
                    raise
                time.sleep(0.1)


def require() -> None:
    """Missing if there is no iperf3."""
    if shutil.which("iperf3") is None:
        raise Missing("iperf3 is not here. Install it with 'apt-get install iperf3'")
