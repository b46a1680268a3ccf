"""`python -m tests.netns.flood ADDRESS RATE SECONDS NAME`: questions as fast as that, unanswered.

Run in the sandbox that is to be the hostile one. Prints how many it sent.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time

from tests.bench.lookups import PORT, question

EVERY = 0.005  # s between two bursts


def main(address: str, rate: int, seconds: float, name: str) -> int:
    """Send `rate` questions a second to a name server; how many there were."""
    wire = question(1, name)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        begin = time.monotonic()
        sent = 0
        send = sock.send
        while (now := time.monotonic() - begin) < seconds:
            for _ in range(int(now * rate) - sent):
                with contextlib.suppress(OSError):
                    send(wire)
                sent += 1
            time.sleep(EVERY)
    return sent


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))
