"""Questions to the name server: a name as its labels, a record type, and the reverse tree.

The reverse tree holds addresses as names: 192.0.2.1 is 1.2.0.192.in-addr.arpa (RFC 1035,
section 3.5), an IPv6 address is its nibbles under ip6.arpa (RFC 3596, section 2.5).
What stands opposite: core/names.py answers; agent/resolver reads questions off the wire.
"""

from __future__ import annotations

from typing import NamedTuple

from agent.errors import Invalid
from agent.notation import parse_address, shorten

A, SOA, PTR, AAAA, SRV, ANY = 1, 6, 12, 28, 33, 255  # record types, RFC 1035, 3596 and 2782

_NAME_BYTES_MAX = 253  # RFC 1035, section 2.3.4, as text
# How many labels an address has, how many bits a label, in which base it is written.
_TREES = {("in-addr", "arpa"): (4, 8, 10), ("ip6", "arpa"): (32, 4, 16)}


class Question(NamedTuple):
    """A name as its labels, lower case, without the root's empty one; and a record type."""

    labels: tuple[str, ...]
    type: int


class ReversePrefix(NamedTuple):
    """What a name in the reverse tree stands for: the first `bits` of an address."""

    version: int  # 4 or 6
    value: int
    bits: int
    excess: bool  # labels are left that are no part of an address, or too many
    labels: tuple[str, ...]

    @property
    def address(self) -> bytes | None:
        """The whole address (4 or 16 bytes); None if this is only the beginning of one."""
        whole = 32 if self.version == 4 else 128
        return self.value.to_bytes(whole // 8, "big") if self.bits == whole else None

    def zone(self, length: int) -> str:
        """The name, at or above this one, of the first `length` bits, rounded to whole labels."""
        count = length // (8 if self.version == 4 else 4) + 2
        return ".".join(self.labels[-count:])


def reverse_prefix(labels: tuple[str, ...]) -> ReversePrefix | None:
    """Read a name of the reverse tree; None if it is not in that tree."""
    if len(labels) < 2 or (tree := _TREES.get((labels[-2], labels[-1]))) is None:
        return None
    count, bits, base = tree
    value = taken = 0
    for label in labels[-3::-1]:
        part = _part(label, base) if taken < count else None
        if part is None:
            break
        value = value << bits | part
        taken += 1
    version = 4 if base == 10 else 6
    return ReversePrefix(version, value, taken * bits, taken < len(labels) - 2, labels)


def _part(label: str, base: int) -> int | None:
    """An octet in decimal or a nibble in hexadecimal; None for anything else."""
    if base == 16:
        return int(label, 16) if len(label) == 1 and label in "0123456789abcdef" else None
    if not (label.isascii() and label.isdigit() and len(label) <= 3) or str(int(label)) != label:
        return None
    return int(label) if int(label) < 256 else None


def reverse_labels(address: bytes) -> tuple[str, ...]:
    """The name that stands for an address of 4 or 16 bytes."""
    if len(address) == 4:
        return (*(str(octet) for octet in reversed(address)), "in-addr", "arpa")
    return (*reversed(address.hex()), "ip6", "arpa")


def parse_question(text: str, type: int) -> Question:
    """A question from what a person typed; Invalid if it can be no name.

    An address in place of a name asks for the name of that address if `type` is PTR.
    """
    if type == PTR:
        try:
            return Question(reverse_labels(parse_address(text)), PTR)
        except Invalid:
            pass
    name = text.removesuffix(".").lower()
    labels = tuple(name.split(".")) if name else ()
    sound = name.isascii() and len(name) <= _NAME_BYTES_MAX
    if not text or not sound or not all(0 < len(label) < 64 for label in labels):
        raise Invalid(
            f"name {shorten(text)}",
            "can be no DNS name",
            "Use labels of 1 to 63 ASCII characters with dots between, 253 in all",
        )
    return Question(labels, type)
