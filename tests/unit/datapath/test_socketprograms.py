"""What the programs at connect(2) and getpeername(2) do, run without a kernel.

That the kernel verifies them, and the same on real sockets: tests/netns/test_socketbalancing.py.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import replace

import pytest

from agent.datapath import bpfasm as asm
from agent.datapath.balancerules import Placed
from agent.datapath.socketmaps import Contents, add_up, mark, shape
from agent.datapath.socketprograms import FRONTEND, PROGRAMS, TALLY, connect, getpeername
from agent.drivers.balancing import Backend, Frontend
from agent.drivers.marks import LED
from agent.notation import parse_address
from tests.unit.datapath.bpfmachine import Kernel

ONE = Backend(parse_address("10.1.0.2"), 8080, 1, "1" * 16)
TWO = Backend(parse_address("10.1.0.3"), 8081, 1, "2" * 16)
HTTP = Frontend("a", "n", 7, "tcp", parse_address("10.1.0.100"), 80, (ONE, TWO))
SIX = replace(
    HTTP,
    service="b",
    address=parse_address("fd00:1::100"),
    backends=(Backend(parse_address("fd00:1::2"), 8080, 1, "1" * 16),),
    version=6,
)
SUBNETS = ("10.1.0.0/24", "fd00:1::/64")
VIP = "10.1.0.100"


def placed(frontend: Frontend, *slots: Backend) -> Placed:
    return Placed(frontend, tuple(b.key for b in slots))


def kernel(*frontends: Placed, vnis: tuple[int, ...] = (7,)) -> tuple[Kernel, Contents]:
    """One whose sandbox 1 is in these networks."""
    contents = Contents()
    contents.alter({p.frontend.id: shape(p, SUBNETS) for p in frontends})
    contents.admit((1, vni) for vni in vnis)
    return Kernel(contents.wanted), contents


WEB = placed(HTTP, ONE)
WEB6 = placed(SIX, *SIX.backends)


@pytest.mark.parametrize(
    ("version", "asked", "backend"),
    [
        (4, VIP, "10.1.0.2"),
        (6, f"::ffff:{VIP}", "::ffff:10.1.0.2"),
        (6, "fd00:1::100", "fd00:1::2"),
    ],
)
def test_a_vip_becomes_a_backend_and_the_client_sees_the_vip(
    version: int, asked: str, backend: str
) -> None:
    there, contents = kernel(WEB, WEB6)
    assert there.run(connect(version), asked, 80) == (backend, 8080)
    assert there.mark == mark(parse_address(asked.removeprefix("::ffff:")), 80)
    assert there.run(getpeername(version), backend, 8080) == (asked, 80)
    assert there.run(getpeername(version), backend, 8081) == (backend, 8081), "connected since"
    counts = {n: TALLY.unpack_from(there.tallies, 8 * n)[0] for n in contents.numbers()}
    service = "b" if asked == "fd00:1::100" else "a"
    assert +add_up(counts, contents.numbers()) == {(service, "1" * 16): 1}


@pytest.mark.parametrize(
    "change",
    [
        {"cookie": 2},
        {"mark": 7},
        {"device": 3},
    ],
)
def test_others_and_sockets_of_their_users_are_left_alone(change: dict[str, int]) -> None:
    there, _ = kernel(WEB)
    for name, value in change.items():
        setattr(there, name, value)
    before = there.mark
    assert there.run(connect(4), VIP, 80) == (VIP, 80)
    assert (there.mark, there.note, any(there.tallies)) == (before, None, False)


@pytest.mark.parametrize(
    ("address", "port", "kind", "protocol"),
    [
        (VIP, 81, socket.SOCK_STREAM, socket.IPPROTO_TCP),
        ("10.1.0.2", 80, socket.SOCK_STREAM, socket.IPPROTO_TCP),
        (VIP, 80, socket.SOCK_DGRAM, socket.IPPROTO_UDP),
        (VIP, 80, socket.SOCK_STREAM, 132),  # SCTP
    ],
)
def test_what_is_no_tcp_to_a_vip_is_left_alone(
    address: str, port: int, kind: int, protocol: int
) -> None:
    there, _ = kernel(WEB)
    assert there.run(connect(4), address, port, kind, protocol) == (address, port)
    assert there.mark == 0 and there.note is None


def test_a_sandbox_that_is_not_in_the_vips_network_is_left_to_the_rules() -> None:
    there, _ = kernel(WEB, vnis=(8,))
    assert there.run(connect(4), VIP, 80) == (VIP, 80)


def test_slots_are_hit_alike() -> None:
    there, _ = kernel(placed(HTTP, ONE, ONE, ONE, TWO))
    hits = [there.run(connect(4), VIP, 80) for _ in range(4000)]
    assert {h: hits.count(h) for h in set(hits)}.keys() == {("10.1.0.2", 8080), ("10.1.0.3", 8081)}
    assert 900 < hits.count(("10.1.0.3", 8081)) < 1100


def test_a_led_socket_may_be_led_anew_and_is_unmarked_when_it_goes_elsewhere() -> None:
    there, _ = kernel(WEB)
    there.run(connect(4), VIP, 80)
    assert there.run(connect(4), VIP, 80) == ("10.1.0.2", 8080)
    assert there.mark == mark(HTTP.address, 80)
    assert there.run(connect(4), "10.1.0.9", 9) == ("10.1.0.9", 9)
    assert there.mark == 0
    assert there.run(getpeername(4), "10.1.0.9", 9) == ("10.1.0.9", 9)
    foreign = replace(there, cookie=2, mark=LED | 5)
    foreign.run(connect(4), "10.1.0.9", 9)
    assert foreign.mark == LED | 5, "another agent's"


@pytest.mark.parametrize("mark_after", [None, 0])
def test_who_was_led_to_a_backend_and_then_connects_to_it_sees_the_backend(
    mark_after: int | None,
) -> None:
    there, _ = kernel(WEB)
    there.run(connect(4), VIP, 80)
    if mark_after is not None:
        there.mark = mark_after  # as its user has set it since
    assert there.run(connect(4), "10.1.0.2", 8080) == ("10.1.0.2", 8080)
    assert there.mark == 0
    assert there.run(getpeername(4), "10.1.0.2", 8080) == ("10.1.0.2", 8080)
    there.run(connect(4), VIP, 80)
    assert there.run(getpeername(4), "10.1.0.2", 8080) == (VIP, 80)


def test_a_mark_that_is_like_ours_is_left_to_who_set_it() -> None:
    there, _ = kernel(WEB)
    there.mark = LED | 5
    there.run(connect(4), "10.1.0.9", 9)
    assert there.mark == LED | 5
    there.mark = 0
    there.run(connect(4), VIP, 80)
    there.run(connect(4), "10.1.0.9", 9)
    there.mark = LED | 5
    there.run(connect(4), "10.1.0.9", 9)
    assert there.mark == LED | 5, "though it was led once"


def test_without_a_note_or_a_slot_it_is_left_to_the_rules() -> None:
    there, _ = kernel(WEB)
    there.notes_fail = True
    assert there.run(connect(4), VIP, 80) == (VIP, 80)
    assert there.mark == 0 and not any(there.tallies)
    there, _ = kernel(WEB)
    there.maps["slots"].clear()
    assert there.run(connect(4), VIP, 80) == (VIP, 80)
    there, _ = kernel(WEB)
    ((key, value),) = there.maps["frontends"].items()
    vni, number, _, mark = FRONTEND.unpack(value)
    there.maps["frontends"][key] = FRONTEND.pack(vni, number, 0, mark)
    assert there.run(connect(4), VIP, 80) == (VIP, 80)


def test_what_has_no_number_is_led_and_not_counted() -> None:
    there, _ = kernel(WEB)
    there.tallies = bytearray()
    assert there.run(connect(4), VIP, 80) == ("10.1.0.2", 8080)


def test_who_was_never_led_sees_whom_it_is_connected_to() -> None:
    there, _ = kernel(WEB)
    assert there.run(getpeername(4), "10.1.0.2", 8080) == ("10.1.0.2", 8080)


def test_programs_are_short_and_jump_forward_only() -> None:
    for lines in PROGRAMS.values():
        program = asm.assemble(
            lines, dict.fromkeys(("sandboxes", "frontends", "slots", "notes", "tallies"), 3)
        )
        assert len(program) / asm.SIZE < 200
    with pytest.raises(ValueError, match="loop"):
        asm.assemble(["loop", asm.jump("loop")], {})
    with pytest.raises(KeyError, match="missing"):
        asm.assemble([asm.map_of(asm.R1, "missing")], {})


def test_instructions_are_written_as_the_kernel_reads_them() -> None:
    """As RFC 9669 has them, by hand."""
    lines: list[asm.Line | str] = [
        asm.move(asm.R6, asm.R1),  # r6 = r1
        asm.load(asm.R1, asm.R6, 32),  # r1 = *(u32 *)(r6 + 32)
        asm.jump_if(asm.R1, "!=", 1, "out"),  # if w1 != 1 goto +8
        *asm.address(asm.R2, asm.FP, -16),  # r2 = r10; r2 += -16
        asm.map_of(asm.R1, "m"),  # r1 = map 5 ll
        asm.call("map_lookup_elem"),  # call 1
        asm.store_number(asm.FP, -8, 0, 8),  # *(u64 *)(r10 - 8) = 0
        asm.count(asm.R0, 0, asm.R1),  # lock *(u64 *)(r0 + 0) += r1
        "out",
        *asm.leave(1),  # w0 = 1; exit
    ]
    assert asm.assemble(lines, {"m": 5}) == bytes.fromhex(
        "bf16000000000000 6161200000000000 5601070001000000"
        "bfa2000000000000 07020000f0ffffff 1811000005000000 0000000000000000"
        "8500000001000000 7a0af8ff00000000 db10000000000000"
        "b400000001000000 9500000000000000"
    )
    assert struct.calcsize("<BBhi") == asm.SIZE
