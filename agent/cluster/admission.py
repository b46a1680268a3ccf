"""Who may begin a handshake, decided by address alone, before any cryptography is done.

A handshake costs some 2 ms of the loop's time (P-256, in Python's ssl), and everybody who can
reach the port can ask for one. So strangers share a small allowance, and the addresses of the
cluster's nodes have one each, which no stranger can use up. Addresses can be feigned only by who
also gets the answers: there is a TCP connection before anything is counted here.
What stands opposite: front.py.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Set
from typing import Protocol

from agent.cluster.refusals import Reason
from agent.core.ratelimit import Buckets

# A node that joins or is back makes a handshake to ask who we are, one for its stream and one for
# its pings; 5 a second let a dozen agents behind one address do so within seconds.
STRANGER_RATE, STRANGER_BURST = 5.0, 20.0
STRANGERS_KNOWN = 4096  # addresses with a bucket, some 150 bytes each: below 1 MB
# All strangers together: 50 handshakes a second are some 10 % of the loop's time.
STRANGERS_RATE, STRANGERS_BURST = 50.0, 100.0
# A node makes one for each request for addresses and each wait beside its stream and its pings;
# scripts that make endpoints in parallel come to some 20 a second. It can spend a tenth of our
# loop at most.
MEMBER_RATE, MEMBER_BURST = 50.0, 200.0
MEMBERS_KNOWN = 4096
# Connections that have not finished their handshake. Honest ones are here for some 5 ms; each
# costs a descriptor and some 100 kB (a TLS state and its buffers): 6 MB at most.
STRANGERS_WAITING = 64
STRANGER_WAITING = 8  # of one address
MEMBER_WAITING = 32


class Waiting(Protocol):
    """A connection in its handshake."""

    address: str

    def evict(self) -> None:
        """Another one needs the place."""


class Admission:
    """The books on all that wait. `members` are the addresses of the cluster's nodes."""

    def __init__(self, members: Callable[[], Set[str]]) -> None:
        self._members = members
        self._held: dict[Waiting, str] = {}  # all that wait -> as whom they are counted
        self._strangers: dict[Waiting, None] = {}  # those of them that are strangers, oldest first
        self._waiting: Counter[str] = Counter()
        self._by_address = Buckets(STRANGER_RATE, STRANGER_BURST, STRANGERS_KNOWN)
        self._together = Buckets(STRANGERS_RATE, STRANGERS_BURST)
        self._by_member = Buckets(MEMBER_RATE, MEMBER_BURST, MEMBERS_KNOWN)

    def enter(self, waiting: Waiting) -> Reason | None:
        """Take a connection in; why not, if it is one too many. `leave` must follow if it was.

        Of too many strangers the one goes that waits longest: who fills all places by saying
        nothing does not keep out those that speak.
        """
        is_member = waiting.address in self._members()
        key = waiting.address if is_member else group(waiting.address)
        if self._waiting[key] >= (MEMBER_WAITING if is_member else STRANGER_WAITING):
            return Reason.BUSY
        if not is_member:
            if len(self._strangers) >= STRANGERS_WAITING:
                oldest = next(iter(self._strangers))
                self.leave(oldest)
                oldest.evict()
            self._strangers[waiting] = None
        self._held[waiting] = key
        self._waiting[key] += 1
        return None

    def leave(self, waiting: Waiting) -> None:
        """Its handshake is over, one way or the other. Nothing happens the second time."""
        key = self._held.pop(waiting, None)
        if key is None:
            return
        self._strangers.pop(waiting, None)
        self._waiting[key] -= 1
        if self._waiting[key] <= 0:
            del self._waiting[key]

    def attempt(self, address: str, now: float) -> Reason | None:
        """Whether `address` may cost us a handshake now; why not, if it may not."""
        if address in self._members():
            return None if self._by_member.take(address, now) else Reason.RATE
        if not self._by_address.take(group(address), now):
            return Reason.RATE
        return None if self._together.take("", now) else Reason.BUSY


def group(address: str) -> str:
    """Who is counted as one: an IPv4 address, a /64 of IPv6, of which a host has all addresses."""
    address = address.partition("%")[0]  # without the scope of a link-local one
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Network((address, 64), strict=False).network_address)
