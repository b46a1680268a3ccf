"""`python -m tests.netns.flood ADDRESS RATE SECONDS NAME`: questions as fast as that, unanswered.

Run in the sandbox that is to be the hostile one. Says when it has begun, ends after so long or by
SIGTERM, and prints how many it sent. A thousand go with one call, so that it is the kernel that
sends and not Python. Source: sendmmsg(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time

from tests.bench.lookups import PORT, question

BATCH = 1000
BEGUN = "it floods"


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vectors_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("sent", ctypes.c_uint),
    )


def main(address: str, rate: int, seconds: float, name: str) -> int:
    """Send `rate` questions a second to a name server; how many there were."""
    wire = question(1, name)
    vector = _Vector(wire, len(wire))
    headers = (_Header * BATCH)()
    for header in headers:
        header.vectors, header.vectors_length = ctypes.pointer(vector), 1
    libc = ctypes.CDLL(None, use_errno=True)
    is_over = False

    def end(*_: object) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, end)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        begin = time.monotonic()
        sent = 0
        while not is_over and (now := time.monotonic() - begin) < seconds:
            if sent >= now * rate:
                time.sleep(BATCH / rate / 2)
                continue
            done = libc.sendmmsg(sock.fileno(), headers, BATCH, 0)
            if done < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            if not sent:
                print(BEGUN, flush=True)
            sent += done
    return sent


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))
